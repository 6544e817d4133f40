"""Time of a step, from published speeds: what an estimate rests on is stated, and can be set.

    micro-batch on a stage   FLOPs / (peak x MFU); one forward, two backward, one more where blocks are recomputed
    step                     1F1B over the stages, plus what is sent and does not hide, plus the optimizer's traffic

MFU counts every key of a query and no recomputation, as llm-foundry's published runs of MPT models do ("Training
benchmarks" in its README, bf16, one node, 125M to 70B parameters); between two of them it is interpolated over
the logarithm of the parameters. The runs of 30B and 70B recomputed, so that their hardware
utilisation is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron.config.schema.config import Config
from megatron.model.accounting import flops_per_token, num_parameters
from megatron.planning import schedule
from megatron.planning.activations import tokens
from megatron.planning.communication import Traffic
from megatron.planning.layout import Layout
from megatron.planning.memory import num_moments
from megatron.planning.stages import Stage

_A100 = ((125e6, 0.448), (350e6, 0.516), (760e6, 0.569), (1.3e9, 0.599), (3e9, 0.621), (7e9, 0.642), (13e9, 0.596))
_H100 = ((125e6, 0.41), (760e6, 0.349), (1.3e9, 0.418), (3e9, 0.437), (7e9, 0.464), (13e9, 0.398), (30e9, 0.586))

_FLOAT8 = ((350e6, 1.0), (1.7e9, 1.17), (8e9, 1.25))
"""(parameters, tokens/s in fp8 by those in bf16) of compiled models on H100s: nanochat's log of 2026-02-02, and
torchao's documentation for Llama 3 8B; small models were no faster."""

_LAUNCHES = 0.2e-3
"""Seconds in which the host issues the forward pass of a block: some 25 kernels of 8 microseconds; no GPU is faster."""


_TO_CPU = 25e9
"""Bytes per second between a GPU and page-locked memory: 16 lanes of PCI Express 4.0."""


@dataclass(frozen=True)
class Gpu:
    """A GPU and its usual surroundings.

    memory: GiB. peak: dense half-precision TFLOP/s. peak_fp32: TFLOP/s without tensor cores. bandwidth: of its memory,
    GB/s. link: GB/s that it sends to its node, network: to other nodes, both as achieved by large messages.
    anchors: (parameters, MFU) of published runs. float8: whether it multiplies in 8 bits.
    """

    name: str
    memory: float
    peak: float
    peak_fp32: float
    bandwidth: float
    link: float
    network: float
    anchors: tuple[tuple[float, float], ...]
    float8: bool = False


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 40, 312, 19.5, 1555, 200, 20, _A100),
        Gpu("A100-80", 80, 312, 19.5, 2039, 200, 20, _A100),
        Gpu("H100", 80, 989, 67, 3350, 350, 40, _H100, float8=True),
        Gpu("H200", 139, 989, 67, 4800, 350, 40, _H100, float8=True),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What the estimate of time rests on.

    mfu: of one GPU that computes without recomputation, idling or waiting. node: GPUs of one machine.
    """

    gpu: Gpu
    mfu: float
    source: str
    node: int = 8


@dataclass(frozen=True)
class Speed:
    """A step's time in seconds, and where it goes.

    compute: of the slowest stage; of it, recompute: what is computed twice. idle: of the pipeline, compute's share.
    exposed: seconds of communication that nothing hides. optimizer: seconds of the update.
    """

    step: float
    compute: float
    recompute: float
    idle: float
    exposed: float
    optimizer: float
    tokens_per_second: float


def assume(gpu: Gpu, num_parameters: int, mfu: float | None = None, node: int = 8) -> Assumptions:
    """Return the assumptions for a model on a GPU; mfu: overrides the published one."""
    if mfu is not None:
        return Assumptions(gpu, mfu, "given", node)
    return Assumptions(gpu, interpolate(gpu.anchors, num_parameters), "llm-foundry's published runs", node)


def interpolate(anchors: Sequence[tuple[float, float]], size: float) -> float:
    """Return the value at `size` between anchors (size, value), linear in log(size); the ends extend flat."""
    if size <= anchors[0][0]:
        return anchors[0][1]
    for (low, first), (high, second) in pairwise(anchors):
        if size <= high:
            return first + (second - first) * math.log(size / low) / math.log(high / low)
    return anchors[-1][1]


def stage_flops(config: Config, layout: Layout, parts: Sequence[Stage], vocab_size: int) -> list[tuple[float, float]]:
    """Return (blocks, head) FLOPs per stage of one micro-batch on one GPU, forward and backward."""
    count = tokens(config, layout) / layout.tp
    head = 6.0 * vocab_size * config.model.hidden_size * count
    block = (flops_per_token(config.model, 0, causal=False) / config.model.num_layers) * count
    return [(block * len(stage.blocks), head if stage.has_head else 0.0) for stage in parts]


def speed(
    config: Config,
    layout: Layout,
    parts: Sequence[Stage],
    sent: Sequence[Sequence[Traffic]],
    numel: Sequence[int],
    vocab_size: int,
    assumptions: Assumptions,
    simulate: bool = True,
    travelling: Sequence[float] | None = None,
) -> Speed:
    """Return the estimate for one layout.

    sent: the traffic of each stage; numel: the parameters on a GPU of each. simulate: run the schedule event by event
    instead of estimating it. travelling: bytes of a micro-batch that each stage sends to the CPU and takes back."""
    rate = assumptions.mfu * 1e12 * peak(config, assumptions.gpu)
    if config.numerics.precision == "fp8":
        rate *= interpolate(_FLOAT8, num_parameters(config.model, vocab_size))
    flops = stage_flops(config, layout, parts, vocab_size)
    again = [_recomputed_flops(config, layout, stage, blocks) for stage, (blocks, _) in zip(parts, flops, strict=True)]
    waits = [_per_micro_batch(one, layout, assumptions) for one in sent]
    least = [_LAUNCHES * len(stage.blocks) for stage in parts]
    moved = [size / _TO_CPU for size in travelling or [0.0] * len(parts)]
    passes = 3.0 if layout.recompute else 2.0
    forward = [
        max(sum(one) / 3 / rate, floor, move) + wait / 2
        for one, wait, floor, move in zip(flops, waits, least, moved, strict=True)
    ]
    backward = [
        max((2 / 3 * sum(one) + more) / rate, passes * floor, move) + wait / 2
        for one, more, wait, floor, move in zip(flops, again, waits, least, moved, strict=True)
    ]
    run = (schedule.step_time if simulate else schedule.estimate)(forward, backward, layout.accumulation)
    compute = layout.accumulation * max((sum(one) + more) / rate for one, more in zip(flops, again, strict=True))
    busy = layout.accumulation * max(one + two for one, two in zip(forward, backward, strict=True))
    once = max(_exposed(one, layout, assumptions, run) for one in sent)
    update = max(_optimizer(config, layout, one, assumptions.gpu) for one in numel)
    step = run + once + update
    return Speed(
        step=step,
        compute=compute,
        recompute=layout.accumulation * max(again) / rate,
        idle=1 - busy / run,
        exposed=once + busy - compute,
        optimizer=update,
        tokens_per_second=layout.batch * config.model.seq_length / step,
    )


def _recomputed_flops(config: Config, layout: Layout, stage: Stage, blocks: float) -> float:
    """Return the FLOPs that a stage's recomputation adds to a micro-batch. blocks: those of its blocks without it."""
    count = sum(layout.recomputes(layer) for layer in stage.blocks)
    if layout.recompute:
        return blocks / 3 * count / max(1, len(stage.blocks))
    scores = 4.0 * config.model.seq_length * config.model.hidden_size * tokens(config, layout) / layout.tp
    return scores * count if "attention" in layout.operations else 0.0


def peak(config: Config, gpu: Gpu) -> float:
    """Return the TFLOP/s of a GPU in the type of the config's weights."""
    return gpu.peak_fp32 if config.numerics.weight_precision == "fp32" else gpu.peak


def _per_micro_batch(sent: Sequence[Traffic], layout: Layout, assumptions: Assumptions) -> float:
    """Return the seconds that a stage waits in each micro-batch: for the tensor, pipeline and context axes."""
    total = sum(one.sent / _bytes_per_second(one.axis, layout, assumptions) for one in sent if one.axis != "data")
    return total / layout.accumulation


def _exposed(sent: Sequence[Traffic], layout: Layout, assumptions: Assumptions, run: float) -> float:
    """Return the seconds that the data axis adds to a step; what hides costs only what exceeds the computation."""
    times = [
        (one.hidden, one.sent / _bytes_per_second("data", layout, assumptions)) for one in sent if one.axis == "data"
    ]
    hidden = sum(time for hides, time in times if hides)
    return sum(time for hides, time in times if not hides) + max(0.0, hidden - run)


def _bytes_per_second(axis: str, layout: Layout, assumptions: Assumptions) -> float:
    """Return what a GPU sends over an axis: within a node where the ranks that it spans fit into one.

    Ranks are laid out tensor first, then context, data and pipeline."""
    spans = {
        "tensor": layout.tp,
        "context": layout.tp * layout.cp,
        "data": layout.tp * layout.cp * layout.dp,
        "pipeline": layout.gpus,
    }
    within = spans[axis] <= assumptions.node
    return 1e9 * (assumptions.gpu.link if within else assumptions.gpu.network)


def _optimizer(config: Config, layout: Layout, numel: int, gpu: Gpu) -> float:
    """Return the seconds of the update: gradient, master and moments are read, master, moments and weight written.

    Offloaded, gradients and weights cross PCI Express at 20 GB/s and the CPU reads and writes at 100 GB/s a GPU."""
    share = numel if layout.zero_stage == 0 else numel / layout.replicas
    traffic = (10 + 2 * layout.moment_bytes * num_moments(config)) * share + 4 * share
    if layout.offload:
        return 6 * share / 20e9 + traffic / 100e9
    return traffic / (1e9 * gpu.bandwidth)
