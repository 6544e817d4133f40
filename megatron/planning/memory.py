"""Bytes on each GPU, by pipeline stage and term.

The state of P parameters on a GPU (its tensor and pipeline share), with w bytes a weight, m moments of the optimizer of
b bytes each (4, or 2 under moments_dtype: bf16) and D replicas (data-parallel GPUs times context-parallel ones), as the
engines of this library hold it:

    stage                      weights   masters   moments    gradients
    0  (our own engine)        w P       4 P *     b m P      4 P **, ***
    1                          w P       4 P / D * b m P / D  4 P
    2                          w P       4 P / D * b m P / D  4 P / D
    3                          w P / D   4 P / D * b m P / D  4 P / D ***
    * none in fp32, where the weights are the masters    ** of the largest tensor alone under optimizer_in_backward
    *** w P of one process with one micro-batch and AdamW: autograd's own, which come as the activations go
        (not under ZeRO 3 in fp16)

Under offload_activations the activations of two blocks are on the GPU at once, and the rest in the CPU's memory.

Two moments can be the fullest: the backward pass, with activations, and the update, with DeepSpeed's copies of the
gradients. The total is the larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema.config import Config
from megatron.model.accounting import layer_types
from megatron.planning.activations import block_bytes, boundary_bytes, loss_bytes, working_bytes
from megatron.planning.layout import WEIGHT_BYTES, Layout
from megatron.planning.stages import Stage

GIBIBYTE = 2**30
RESERVE = 1.5 * GIBIBYTE
"""CUDA's context, NCCL's channels and what the allocator cannot use: an allowance, to be set by --reserve."""

_BUFFERED_ELEMENTS = 500_000_000
"""DeepSpeed's engine reduces gradients of at most this many elements at once where ZeRO's buckets do not."""


@dataclass(frozen=True)
class State:
    """Bytes that stay from step to step, and the gradients."""

    weights: int
    masters: int
    moments: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.masters + self.moments + self.gradients


@dataclass(frozen=True)
class StageMemory:
    """One GPU of one pipeline stage, in bytes.

    layers: first and last block (from 0), None where the stage has none. num_parameters: on this GPU.
    activations: what waits for its backward pass, of all micro-batches in flight. loss: of the last stage.
    working: of the block that is being computed. buffers: of communication. update: what the update needs beside the
    state, when activations and loss are gone. reserve: allowance for what no tensor shows. travelling: activations in
    the CPU's memory instead of the GPU's. gradients_come: they are not there before activations and loss go.
    """

    stage: int
    layers: tuple[int, int] | None
    num_parameters: int
    state: State
    activations: int
    loss: int
    working: int
    buffers: int
    update: int
    reserve: int
    travelling: int = 0
    gradients_come: bool = False

    @property
    def backward(self) -> int:
        """Bytes in the backward pass."""
        kept, gradients = self.activations + self.loss, self.state.gradients
        changing = max(kept, gradients) if self.gradients_come else kept + gradients
        return self.state.total - gradients + changing + self.working + self.buffers + self.reserve

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.backward, self.state.total + self.update + self.reserve)


def stage_memory(
    config: Config, layout: Layout, parts: list[Stage], vocab_size: int, reserve: float = RESERVE
) -> list[StageMemory]:
    """Return the bytes of a GPU of each stage; `parts` are those of `stages` for it."""
    kept = _kept_bytes(config, layout)
    result = []
    for index, stage in enumerate(parts):
        numel = stage.num_parameters
        in_flight = min(layout.pp - index, layout.accumulation)
        held = in_flight * _in_flight(config, layout, stage, kept)
        near = min(held, _near(config, layout, stage, kept)) if layout.travels else held
        result.append(
            StageMemory(
                stage=index,
                layers=(stage.blocks[0], stage.blocks[-1]) if stage.blocks else None,
                num_parameters=numel,
                state=state_bytes(config, layout, numel),
                activations=near + _recomputed(layout, stage, kept),
                loss=loss_bytes(config, layout, vocab_size) if stage.has_head else 0,
                working=working_bytes(config, layout, stage.largest),
                buffers=buffer_bytes(config, layout, numel) + message_bytes(config, layout, index),
                update=update_bytes(config, layout, numel),
                reserve=int(reserve),
                travelling=held - near,
                gradients_come=has_own_gradients(config, layout),
            )
        )
    return result


def state_bytes(config: Config, layout: Layout, numel: int) -> State:
    """Return the state of `numel` parameters on a GPU; offloaded states count nothing."""
    weight, shards, stage = WEIGHT_BYTES[config.numerics.weight_precision], layout.replicas, layout.zero_stage
    share = -(-numel // shards)
    gradient = weight if has_own_gradients(config, layout) else _gradient_bytes(config) if stage else 4
    own = numel if stage == 0 else share
    return State(
        weights=weight * (share if stage == 3 else numel),
        masters=0 if layout.offload or weight == 4 else 4 * own,
        moments=0 if layout.offload else round(layout.moment_bytes * num_moments(config) * own),
        gradients=0 if layout.at_once else gradient * (share if stage >= 2 else numel),
    )


def num_moments(config: Config) -> float:
    """Return how many numbers the optimizer keeps for each parameter."""
    block = config.optimizer.optimizer
    momentum = bool(block["params"].get("momentum"))
    kinds = {"sgd": int(momentum), "lion": 1, "madgrad_wd": 2 + int(momentum), "sm3": int(momentum)}
    return kinds.get(str(block.get("type", "adam")).lower(), 2)


def is_adam(config: Config) -> bool:
    """Return whether the optimizer is one whose moments may be kept in bf16."""
    return str(config.optimizer.optimizer.get("type", "adam")).lower() in ("adam", "adamw", "cpu_torch_adam")


def has_own_gradients(config: Config, layout: Layout) -> bool:
    """Return whether autograd's own gradients are those of the step, on one process that adds none up."""
    is_alone = layout.gpus == layout.accumulation == 1 and not layout.offload and is_adam(config)
    if layout.zero_stage == 3:
        return is_alone and config.numerics.precision != "fp16"
    return is_alone and layout.zero_stage == 0 and not layout.at_once and config.kernels.cuda_graphs is not True


def buffer_bytes(config: Config, layout: Layout, numel: int) -> int:
    """Return the communication buffers of the backward pass.

    DeepSpeed allocates its reduce bucket whole, in the type of communication, however small the model; stages 2 and
    3 flatten a copy of it while they reduce. Stage 1 in bf16 has no bucket. ZeRO 3 keeps weights gathered that it
    will need again soon. Stage 0 reduces its flat gradient in place, and stage 3 on one GPU nothing."""
    if layout.zero_stage == 0 or (layout.zero_stage == 1 and _is_bf16_optimizer(config)) or _is_straight(layout):
        return 0
    size = _communication_bytes(config)
    buffers = 2 if layout.overlap and layout.zero_stage < 3 else 1
    total = buffers * size * layout.bucket
    if layout.zero_stage >= 2:
        total += size * min(layout.bucket, numel)
    if layout.zero_stage == 3:
        total += WEIGHT_BYTES[config.numerics.weight_precision] * min(numel, layout.live)
    return total


def message_bytes(config: Config, layout: Layout, index: int) -> int:
    """Return the hidden states that DeepSpeed's pipeline holds beside what autograd keeps, on stage `index`.

    For each micro-batch in flight a copy of what came and what was sent, and the buffers that receive: hidden states
    from the stage before, their gradients from the one behind. The last stage has its own result, and what comes next.
    """
    if layout.pp == 1:
        return 0
    in_flight = min(layout.pp - index, layout.accumulation)
    neighbours = (index > 0) + (index < layout.pp - 1)
    own = min(2, layout.accumulation) if index == layout.pp - 1 else 0
    return (neighbours * (in_flight + 1) + own) * boundary_bytes(config, layout)


def update_bytes(config: Config, layout: Layout, numel: int) -> int:
    """Return what the update needs beside the state: DeepSpeed's flat copies of gradients.

    Stage 1 reduces when the backward pass is over: a bucket's gradients move into it, and a copy of it and this GPU's
    share are made. Stages 2 (in fp32) and 3 copy their share for the optimizer."""
    size, share = _communication_bytes(config), -(-numel // layout.replicas)
    if layout.zero_stage == 0 or _is_straight(layout):
        return 0
    if layout.zero_stage == 1 and _is_bf16_optimizer(config):
        return size * min(numel, _BUFFERED_ELEMENTS) if layout.replicas > 1 else 0
    if layout.zero_stage == 1:
        return size * layout.bucket + 4 * share
    if layout.zero_stage == 2:
        return 4 * share if config.numerics.weight_precision == "fp32" else 0
    return size * layout.bucket + 4 * share


def _is_straight(layout: Layout) -> bool:
    """Return whether gradients go straight to where the update reads them, and weights are gathered as views."""
    return layout.zero_stage == 3 and layout.gpus == 1 and not layout.offload


def _is_bf16_optimizer(config: Config) -> bool:
    """Return whether DeepSpeed serves stage 1 by its BF16_Optimizer: in bf16 with gradients summed in fp32."""
    return config.numerics.weight_precision == "bf16" and _gradient_bytes(config) == 4


def _gradient_bytes(config: Config) -> int:
    return WEIGHT_BYTES[(config.deepspeed.data_types or {}).get("grad_accum_dtype", "fp32")]


def _communication_bytes(config: Config) -> int:
    return WEIGHT_BYTES[config.deepspeed.communication_data_type or "fp32"]


def _kept_bytes(config: Config, layout: Layout) -> dict[int, int]:
    """Return what each block keeps; blocks of one attention type keep the same."""
    types = layer_types(config.model)
    kinds = [(kind, layout.recomputes(layer)) for layer, kind in enumerate(types)]
    by_kind = {kind: block_bytes(config, layout, kinds.index(kind)) for kind in dict.fromkeys(kinds)}
    return {layer: by_kind[kind] for layer, kind in enumerate(kinds)}


def _in_flight(config: Config, layout: Layout, stage: Stage, kept: dict[int, int]) -> int:
    """Return what one micro-batch keeps on a stage until its backward pass."""
    whole = [layer for layer in stage.blocks if layout.recompute and layout.recomputes(layer)]
    chunks = -(-len(whole) // max(1, layout.recompute))
    return chunks * boundary_bytes(config, layout) + sum(kept[layer] for layer in stage.blocks if layer not in whole)


def _near(config: Config, layout: Layout, stage: Stage, kept: dict[int, int]) -> int:
    """Return what is on the GPU of activations that travel: of the block at work and the one before or after it."""
    whole = [layer for layer in stage.blocks if layout.recompute and layout.recomputes(layer)]
    sizes = [boundary_bytes(config, layout) if layer in whole else kept[layer] for layer in stage.blocks]
    return sum(sorted(sizes, reverse=True)[:2])


def _recomputed(layout: Layout, stage: Stage, kept: dict[int, int]) -> int:
    """Return the activations of the blocks that are recomputed together."""
    sizes = sorted((kept[layer] for layer in stage.blocks if layout.recomputes(layer)), reverse=True)
    return sum(sizes[: layout.recompute])
