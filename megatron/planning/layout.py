"""How a run is spread over GPUs: the numbers that a plan varies, apart from the model, which it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.config.blocks import ZeroOptimization
from megatron.config.engine import choose_engine
from megatron.config.schema.config import Config

_DEFAULTS = ZeroOptimization()
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, and what changes memory or time without changing the model.

    dp, tp, pp, cp: processes of the data, tensor, pipeline and context axis; their product is the number of GPUs.
    zero_stage: 0 to 3. micro_batch: sequences computed at once. accumulation: micro-batches of one optimizer step.
    recompute: consecutive blocks that are recomputed together in the backward pass; 0 recomputes no whole block.
    operations: of each block, what is recomputed by itself. first: blocks that any of this is done to; None is all.
    persistence: elements of the largest tensor that ZeRO 3 never shards. bucket: of DeepSpeed's reduce bucket.
    live: of weights that ZeRO 3 keeps gathered on purpose.
    offload: optimizer states (and masters) lie in CPU memory. overlap: gradients are reduced during the backward pass.
    moment_bytes: of each number that Adam keeps. at_once: weights are updated in the backward pass.
    travels: what blocks keep for the backward pass lies in CPU memory.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    recompute: int = 0
    operations: tuple[str, ...] = ()
    first: int | None = None
    persistence: int = _DEFAULTS.stage3_param_persistence_threshold
    bucket: int = _DEFAULTS.reduce_bucket_size
    live: int = _DEFAULTS.stage3_max_live_parameters
    offload: bool = False
    overlap: bool = False
    moment_bytes: int = 4
    at_once: bool = False
    travels: bool = False

    @classmethod
    def of(cls, config: Config) -> Layout:
        """Return the layout that a config asks for."""
        parallel, zero = config.parallel, ZeroOptimization(**config.parallel.zero_optimization)
        tp, pp = parallel.model_parallel_size, max(1, parallel.pipe_parallel_size)
        cp, training = parallel.context_parallel_size, config.training
        operations = training.checkpoint_operations
        whole = training.checkpoint_activations and operations is None
        return cls(
            dp=parallel.world_size // (tp * pp * cp),
            tp=tp,
            pp=pp,
            cp=cp,
            sequence_parallel=parallel.sequence_parallel and tp > 1,
            zero_stage=choose_engine(config).stage,
            micro_batch=config.batch.train_micro_batch_size_per_gpu,
            accumulation=config.batch.gradient_accumulation_steps,
            recompute=training.checkpoint_num_layers if whole else 0,
            operations=tuple(operations or ()) if training.checkpoint_activations else (),
            first=training.checkpoint_first_layers if training.checkpoint_activations else None,
            persistence=zero.stage3_param_persistence_threshold,
            bucket=zero.reduce_bucket_size,
            live=_live(zero),
            offload=zero.offload_optimizer is not None and zero.offload_optimizer.device != "none",
            overlap=zero.overlap_comm,
            moment_bytes=WEIGHT_BYTES[config.optimizer.moments_dtype],
            at_once=config.optimizer.optimizer_in_backward,
            travels=training.offload_activations,
        )

    @property
    def gpus(self) -> int:
        """Processes of the run."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def replicas(self) -> int:
        """Processes that hold the same parameters, over which gradients are summed and ZeRO shards."""
        return self.dp * self.cp

    def recomputes(self, block: int) -> bool:
        """Return whether anything is recomputed in block number `block`."""
        return bool(self.recompute or self.operations) and (self.first is None or block < self.first)

    @property
    def batch(self) -> int:
        """Sequences of one optimizer step over all GPUs."""
        return self.dp * self.micro_batch * self.accumulation

    def changed(self, **fields: Any) -> Layout:
        """Return this layout with other values."""
        return replace(self, **fields)

    def settings(self, before: Layout) -> dict[str, Any]:
        """Return the YAML keys to write where this layout differs from `before`, with their values."""
        named = {
            "model_parallel_size": (self.tp, before.tp),
            "pipe_parallel_size": (self.pp, before.pp),
            "context_parallel_size": (self.cp, before.cp),
            "sequence_parallel": (self.sequence_parallel, before.sequence_parallel),
            "zero_optimization.stage": (self.zero_stage, before.zero_stage),
            "train_micro_batch_size_per_gpu": (self.micro_batch, before.micro_batch),
            "gradient_accumulation_steps": (self.accumulation, before.accumulation),
            "checkpoint_activations": (_recomputes(self), _recomputes(before)),
            "checkpoint_operations": (list(self.operations) or None, list(before.operations) or None),
            "checkpoint_first_layers": (self.first, before.first),
            "zero_optimization.reduce_bucket_size": (self.bucket, before.bucket),
            "zero_optimization.offload_optimizer.device": (_device(self), _device(before)),
            "moments_dtype": (_moments(self), _moments(before)),
            "optimizer_in_backward": (self.at_once, before.at_once),
            "offload_activations": (self.travels, before.travels),
        }
        return {key: new for key, (new, old) in named.items() if new != old}


def least_stage(pp: int) -> int:
    """Return the lowest ZeRO stage that serves `pp` pipeline stages: pipelines run under stage 1 where 0 is asked."""
    return 1 if pp > 1 else 0


def _recomputes(layout: Layout) -> bool:
    return bool(layout.recompute or layout.operations)


def _moments(layout: Layout) -> str:
    return "bf16" if layout.moment_bytes == 2 else "fp32"


def _device(layout: Layout) -> str:
    return "cpu" if layout.offload else "none"


def _live(zero: ZeroOptimization) -> int:
    """Return the elements of weights that ZeRO 3 keeps gathered between the passes, of a large model.

    A weight stays whose backward pass comes within the reuse distance, in which each weight behind it counts twice.
    What is fetched ahead, a bucket with every module that begins, has no other limit than the live parameters."""
    ahead = zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0
    return max(zero.stage3_max_reuse_distance // 2, ahead)
