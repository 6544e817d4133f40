"""Config -> the dictionary that deepspeed.initialize gets, with every key written out.

DeepSpeed's own defaults have changed between releases (gradient clipping from off to 1.0), so none is relied
on. ZeRO stage 0 is served by our own engine: DeepSpeed's is wrong in fp16 and bf16 and reports no gradient norm. Were
it handed over, it would be as stage 1, whose arithmetic is the same. Gradients are accumulated and reduced in fp32
unless the config says otherwise. DeepSpeed is not told of context parallelism: ranks that share a sequence are data
parallel to it, so its count of sequences is context_parallel_size times ours.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.config.blocks import Bf16, Block, DataTypes, Fp16, Offload, ZeroOptimization
from megatron.config.schema.config import Config

_NEVER = 2**31 - 1
_NOT_SENT = {"cpu_offload", "fp16", "type", "leaf_module", "save_muon_momentum_buffer_in_memory"}


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one run; plain data, so that it can be compared and saved."""
    extra = config.deepspeed
    result: dict[str, Any] = {
        "train_batch_size": config.batch.train_batch_size * config.parallel.context_parallel_size,
        "train_micro_batch_size_per_gpu": config.batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.batch.gradient_accumulation_steps,
        "steps_per_print": _NEVER,
        "gradient_clipping": float(config.optimizer.gradient_clipping),
        "prescale_gradients": extra.prescale_gradients,
        "gradient_predivide_factor": float(extra.gradient_predivide_factor),
        "communication_data_type": extra.communication_data_type or "fp32",
        "data_types": _filled(DataTypes, extra.data_types or {}),
        "fp16": {**_filled(Fp16, extra.fp16 or {}), "enabled": config.numerics.precision == "fp16"},
        "bf16": {**_filled(Bf16, extra.bf16 or {}), "enabled": config.numerics.weight_precision == "bf16"},
        "zero_optimization": _zero(config),
        **_pipeline(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": extra.wall_clock_breakdown,
        "memory_breakdown": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it waits for the GPU at each step
        "dump_state": extra.dump_state,
        "flops_profiler": {"enabled": False, **(extra.flops_profiler or {})},
        "comms_logger": {"enabled": False, **(extra.comms_logger or {})},
        "tensorboard": {"enabled": False},
        "wandb": {"enabled": False},
        "csv_monitor": {"enabled": False},
    }
    return {**result, **copy.deepcopy(extra.deepspeed_extra_args or {})}


def _filled(model: type[Block], given: dict[str, Any]) -> dict[str, Any]:
    """Return all entries of a block: what is given, and our defaults for the rest."""
    defaults = {
        name: info.get_default(call_default_factory=True)
        for name, info in model.model_fields.items()
        if name not in _NOT_SENT and not info.is_required()
    }
    return {name: value for name, value in {**defaults, **copy.deepcopy(given)}.items() if value is not None}


def _pipeline(config: Config) -> dict[str, Any]:
    """Return the block of DeepSpeed's pipeline, where there is one.

    Recomputation is ours, of the same layers as without a pipeline, and stages exchange whole tensors."""
    if config.parallel.pipe_parallel_size <= 1:
        return {}
    settings = {"activation_checkpoint_interval": 0, "use_reentrant": False}
    return {"pipeline": {**settings, "pipe_partitioned": False, "grad_partitioned": False}}


def _zero(config: Config) -> dict[str, Any]:
    """Return the ZeRO block, whose stage is at least 1."""
    given = config.parallel.zero_optimization
    block = _filled(ZeroOptimization, given)
    for name in ("offload_optimizer", "offload_param"):
        if name in given:
            block[name] = _filled(Offload, given[name])
    return {**block, "stage": max(1, block["stage"])}
