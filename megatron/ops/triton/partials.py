"""The second stage of sums over rows: what each program added up is added over the programs, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.triton.launch import runs, start


@triton.jit
def _sum_partials(partials, output, count, width, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COUNT, COLUMNS), dtype=tl.float32)
    for begin in range(0, count, COUNT):
        row = begin + tl.arange(0, COUNT).to(tl.int64)
        inside = (row[:, None] < count) & (column[None, :] < width)
        total += tl.load(partials + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(output + column, tl.sum(total, axis=0).to(output.dtype.element_ty), mask=column < width)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first dim of partials [count, width] fp32, contiguous, as [width] of `dtype`."""
    count, width = partials.shape
    output = partials.new_empty(width, dtype=dtype)
    if runs(output):
        grid = (triton.cdiv(width, 32),)
        start(_sum_partials, grid, partials, output, count, width, COUNT=32, COLUMNS=32, num_warps=4)
    return output
