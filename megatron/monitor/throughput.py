"""How fast training goes: tokens and samples per second, and the share of the hardware's peak that it uses.

Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B):

    MFU = tokens per second * FLOPs per token / (number of GPUs * peak FLOPs per second)

There are two conventions, and both are told: with the whole s x s attention matrix counted (PaLM, Megatron, GPT-NeoX),
and with only its causal half (what a causal kernel computes). Neither counts recomputed activations; hardware
FLOPs utilisation does: with activation checkpointing the forward pass runs twice, so HFU = 4/3 MFU.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

# Dense bf16/fp16 peaks in TFLOP/s from the vendors' data sheets; the first pattern that fits counts.
_PEAKS = (
    (r"GB?200|B200", 2250.0),
    (r"B100", 1750.0),
    (r"GH200|H200|H100 SXM|H100 80GB HBM3|H800", 989.0),
    (r"H100 NVL", 835.0),
    (r"H100", 756.0),
    (r"A100|A800", 312.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"\bL4\b", 121.0),
    (r"A40", 150.0),
    (r"A10G", 70.0),
    (r"A10\b", 125.0),
    (r"V100", 125.0),
    (r"\bT4\b", 65.0),
    (r"RTX 5090", 210.0),
    (r"RTX 4090", 165.0),
    (r"RTX 3090", 71.0),
    (r"MI300X", 1307.0),
    (r"MI250", 362.0),
)


def known_peak(device_name: str) -> float | None:
    """Return the dense 16-bit peak of a GPU in TFLOP/s by its name; None where it is not known, as for CPUs."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class Work:
    """What one optimizer step processes, over all ranks.

    samples, tokens: per step. world_size: processes that share the work.
    flops_per_token, causal_flops_per_token: forward and backward, whole and causal attention; None leaves MFU out.
    peak_tflops: of one device in TFLOP/s; None leaves MFU out.
    recomputes: activations are checkpointed, so the hardware does a second forward pass.
    """

    samples: int
    tokens: int
    world_size: int = 1
    flops_per_token: float | None = None
    causal_flops_per_token: float | None = None
    peak_tflops: float | None = None
    recomputes: bool = False


@dataclass(frozen=True)
class Speed:
    """Rates over the last steps. seconds: of one step. Shares are None where FLOPs or peak are not known."""

    seconds: float
    tokens_per_second: float
    samples_per_second: float
    tflops_per_device: float | None = None
    mfu: float | None = None
    causal_mfu: float | None = None
    hfu: float | None = None


def speed(work: Work, seconds: float) -> Speed:
    """Return the rates of a step of `work` that took `seconds` (more than 0)."""
    tokens, samples = work.tokens / seconds, work.samples / seconds
    if work.flops_per_token is None:
        return Speed(seconds, tokens, samples)
    per_device = tokens * work.flops_per_token / work.world_size / 1e12
    if work.peak_tflops is None:
        return Speed(seconds, tokens, samples, per_device)
    mfu = per_device / work.peak_tflops
    causal = work.causal_flops_per_token
    return Speed(
        seconds,
        tokens,
        samples,
        per_device,
        mfu,
        mfu * causal / work.flops_per_token if causal is not None else None,
        mfu * 4 / 3 if work.recomputes else mfu,
    )


class StepClock:
    """The mean time of the last steps, without what happens between them (validation, checkpoints).

    window: how many steps the mean covers."""

    def __init__(self, window: int = 20) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._count = 0

    def add(self, seconds: float) -> None:
        """Note the time of a step. The very first is dropped later: it pays for allocations and warm-up."""
        self._count += 1
        if self._count == 2:
            self._recent.clear()
        self._recent.append(seconds)

    def mean(self) -> float:
        """Return the mean seconds of the last steps; 0 before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0
