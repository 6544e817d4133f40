"""Cross entropy over logits, which become their own gradients: one program walks one row.

A row's maximum and sum of exponentials are found in one pass (Milakov & Gimelshein 2018): a block's own maximum
rescales the sum so far. A second pass writes the gradient over the logits; the row is in the L2 cache by then, so
device memory sees one read and one write. All arithmetic is fp32. Where ranks hold shares of the vocabulary,
`logits_statistics` and `logits_gradient_` are the two halves, between which the ranks meet.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.logits import Meet
from megatron.ops.triton.launch import Sample, operator, runs, start

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _row_statistics(row, num_columns, BLOCK: tl.constexpr):
    """Return the maximum of a row and the sum of exp(x - maximum), fp32."""
    columns = tl.arange(0, BLOCK)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for begin in range(0, num_columns, BLOCK):
        values = tl.load(row + begin + columns, mask=begin + columns < num_columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(values, axis=0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(values - larger), axis=0)
        maximum = larger
    return maximum, total


@triton.jit
def _write_gradient(row, num_columns, label, maximum, total, scale, BLOCK: tl.constexpr):
    """Write (exp(x - maximum) / total - [column is label]) * scale over a row."""
    columns = tl.arange(0, BLOCK)
    factor = scale / total
    for begin in range(0, num_columns, BLOCK):
        inside = begin + columns < num_columns
        values = tl.load(row + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(values - maximum) * factor - tl.where(begin + columns == label, scale, 0.0)
        tl.store(row + begin + columns, gradient.to(row.dtype.element_ty), mask=inside)


@triton.jit
def _losses(
    logits, labels, losses, stride, num_columns, scale, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a whole vocabulary: its loss, and its gradient in place of its logits."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    label = tl.load(labels + index)
    # Read before the statistics, whose reductions are barriers: another warp may write the gradient over it later.
    target = tl.load(row + label).to(tl.float32)
    maximum, total = _row_statistics(row, num_columns, BLOCK)
    tl.store(losses + index, tl.log(total) + (maximum - target))
    if WITH_GRADIENT:
        _write_gradient(row, num_columns, label, maximum, total, scale, BLOCK)


@triton.jit
def _statistics(logits, labels, statistics, stride, num_rows, num_columns, first, BLOCK: tl.constexpr):
    """One row of a share of the vocabulary: maximum, sum of exp(x - maximum), and its label's logit or 0."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    label = tl.load(labels + index) - first
    is_mine = (label >= 0) & (label < num_columns)
    target = tl.load(row + label, mask=is_mine, other=0.0).to(tl.float32)
    maximum, total = _row_statistics(row, num_columns, BLOCK)
    tl.store(statistics + index, maximum)
    tl.store(statistics + num_rows + index, total)
    tl.store(statistics + 2 * num_rows + index, target)


@triton.jit
def _gradient(logits, labels, maximum, total, stride, num_columns, first, scale, BLOCK: tl.constexpr):
    """One row of a share of the vocabulary: its gradient in place of its logits, from the whole row's statistics."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    label = tl.load(labels + index) - first
    _write_gradient(row, num_columns, label, tl.load(maximum + index), tl.load(total + index), scale, BLOCK)


@operator(mutates=("logits",))
def cross_entropy_losses_(logits: Tensor, labels: Tensor, scale: float, with_gradient: bool) -> Tensor:
    """Return the losses [r] fp32 of logits [r, v] and labels [r] int64 in [0, v).

    with_gradient: the logits become their own gradients times `scale`; otherwise they stay.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if runs(logits):
        rows = _rows(logits)
        constants = {"WITH_GRADIENT": with_gradient, **_constants(logits.shape[1])}
        labels = labels.contiguous()
        start(_losses, (len(rows),), rows, labels, losses, rows.stride(0), rows.shape[1], scale, **constants)
        if with_gradient and rows is not logits:
            logits.copy_(rows)
    return losses


@operator()
def logits_statistics(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Return [3, r] fp32 of logits [r, v/tp], the columns from `first` on, and labels [r] of the whole vocabulary:
    each row's maximum, its sum of exp(x - maximum), and its label's logit, 0 where that is not among the columns.
    """
    statistics = torch.empty((3, len(logits)), dtype=torch.float32, device=logits.device)
    if runs(logits):
        rows = _rows(logits)
        start(
            _statistics,
            (len(rows),),
            rows,
            labels.contiguous(),
            statistics,
            rows.stride(0),
            len(rows),
            rows.shape[1],
            first,
            **_constants(rows.shape[1]),
        )
    return statistics


@operator(mutates=("logits",))
def logits_gradient_(logits: Tensor, labels: Tensor, first: int, maximum: Tensor, total: Tensor, scale: float) -> None:
    """Write (softmax - one-hot) * scale over logits [r, v/tp], given maximum and sum [r] fp32 of the whole rows."""
    if not runs(logits):
        return
    rows = _rows(logits)
    start(
        _gradient,
        (len(rows),),
        rows,
        labels.contiguous(),
        maximum.contiguous(),
        total.contiguous(),
        rows.stride(0),
        rows.shape[1],
        first,
        scale,
        **_constants(rows.shape[1]),
    )
    if rows is not logits:
        logits.copy_(rows)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _constants(num_columns: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(num_columns))
    return {"BLOCK": block, "num_warps": max(1, NUM_WARPS * block // BLOCK)}


def block_losses(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
    """`megatron.ops.cross_entropy.block_losses`; without a scale the logits stay."""
    losses: Tensor = cross_entropy_losses_(logits, labels, 1.0 if scale is None else scale, scale is not None)
    return losses


def share_losses(logits: Tensor, labels: Tensor, scale: float | None, first: int, meet: Meet) -> Tensor:
    """`megatron.ops.logits.share_losses`; without a scale the logits stay."""
    maximum, total, target = meet(logits_statistics(logits, labels, first))
    if scale is not None:
        logits_gradient_(logits, labels, first, maximum, total, scale)
    return total.log() + (maximum - target)


def samples() -> list[Sample]:
    """Rows of GPT-NeoX's vocabulary, whole and in halves."""
    return [Sample(f"cross_entropy {name}", partial(_sample, dtype)) for name, dtype in _DTYPES.items()]


_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _sample(dtype: torch.dtype, device: torch.device) -> None:
    labels = torch.empty(4096, dtype=torch.int64, device=device)
    block_losses(torch.empty(4096, 50304, dtype=dtype, device=device), labels, 1.0)
    block_losses(torch.empty(4096, 50304, dtype=dtype, device=device), labels, None)
    share = torch.empty(4096, 25152, dtype=dtype, device=device)
    share_losses(share, labels, 1.0, 25152, lambda statistics: statistics)
