"""Cross entropy whose rows stay in shared memory between the two passes over them: cross_entropy.cuh says how.

The losses and gradients of a whole vocabulary read and write each logit once. Where ranks hold shares of it, they meet
between two kernels, of which the second reads its logits again, as any would.

The operators are `torch.ops.deepy_cuda`'s: their schemas and what they say of fake tensors are here, their kernels in
the library that `build.make_ready` loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.logits import Meet

_LIBRARY = torch.library.Library("deepy_cuda", "DEF")
_LIBRARY.define("cross_entropy_losses_(Tensor(a!) logits, Tensor labels, float scale) -> Tensor")
_LIBRARY.define("logits_statistics(Tensor logits, Tensor labels, int first) -> Tensor")
_LIBRARY.define(
    "logits_gradient_(Tensor(a!) logits, Tensor labels, int first, Tensor maximum, Tensor total, float scale) -> ()"
)


@torch.library.register_fake("deepy_cuda::cross_entropy_losses_", lib=_LIBRARY)
def _fake_losses(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@torch.library.register_fake("deepy_cuda::logits_statistics", lib=_LIBRARY)
def _fake_statistics(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


@torch.library.register_fake("deepy_cuda::logits_gradient_", lib=_LIBRARY)
def _fake_gradient(logits: Tensor, labels: Tensor, first: int, maximum: Tensor, total: Tensor, scale: float) -> None:
    return None


def block_losses(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
    """`megatron.ops.cross_entropy.block_losses`; without a scale the logits stay."""
    if scale is None:
        return share_losses(logits, labels, None, 0, lambda statistics: statistics)
    rows = _rows(logits)
    losses: Tensor = torch.ops.deepy_cuda.cross_entropy_losses_(rows, labels.contiguous(), scale)
    if rows is not logits:
        logits.copy_(rows)
    return losses


def share_losses(logits: Tensor, labels: Tensor, scale: float | None, first: int, meet: Meet) -> Tensor:
    """`megatron.ops.logits.share_losses`; without a scale the logits stay."""
    rows, labels = _rows(logits), labels.contiguous()
    maximum, total, target = meet(torch.ops.deepy_cuda.logits_statistics(rows, labels, first))
    if scale is not None:
        torch.ops.deepy_cuda.logits_gradient_(rows, labels, first, maximum.contiguous(), total.contiguous(), scale)
        if rows is not logits:
            logits.copy_(rows)
    return total.log() + (maximum - target)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
