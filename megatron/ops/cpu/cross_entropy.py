"""Cross entropy whose rows stay in a core's cache between the passes over them: cross_entropy.cpp says how."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import cross_entropy
from megatron.ops import logits as shares
from megatron.ops.cpu.library import DTYPES, is_plain, kernel
from megatron.ops.logits import Meet


def block_losses(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
    """`megatron.ops.cross_entropy.block_losses`; without a scale the logits stay."""
    if not is_plain(logits) or labels.dtype != torch.int64:
        return cross_entropy.block_losses(logits, labels, scale)
    rows, labels = _rows(logits), labels.contiguous()
    losses = torch.empty(len(rows), dtype=torch.float32)
    outside = kernel("deepy_block_losses", "pippiiiif")(
        rows.data_ptr(), DTYPES[rows.dtype], labels.data_ptr(), losses.data_ptr(),
        *rows.shape, rows.stride(0), scale is not None, 1.0 if scale is None else scale,
    )  # fmt: skip
    if outside >= 0:
        raise IndexError(f"label {int(labels[outside])} is outside of the vocabulary of {rows.shape[1]}")
    if rows is not logits and scale is not None:
        logits.copy_(rows)
    return losses


def share_losses(logits: Tensor, labels: Tensor, scale: float | None, first: int, meet: Meet) -> Tensor:
    """`megatron.ops.logits.share_losses`; without a scale the logits stay."""
    if not is_plain(logits) or labels.dtype != torch.int64:
        return shares.share_losses(logits, labels, scale, first, meet)
    rows, labels = _rows(logits), labels.contiguous()
    statistics = torch.empty((3, len(rows)), dtype=torch.float32)
    kernel("deepy_logits_statistics", "pippiiii")(
        rows.data_ptr(), DTYPES[rows.dtype], labels.data_ptr(), statistics.data_ptr(),
        *rows.shape, rows.stride(0), first,
    )  # fmt: skip
    maximum, total, target = (part.contiguous() for part in meet(statistics))
    if scale is not None:
        kernel("deepy_logits_gradient", "pipppiiiif")(
            rows.data_ptr(), DTYPES[rows.dtype], labels.data_ptr(), maximum.data_ptr(), total.data_ptr(),
            *rows.shape, rows.stride(0), first, scale,
        )  # fmt: skip
        if rows is not logits:
            logits.copy_(rows)
    return total.log() + (maximum - target)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
