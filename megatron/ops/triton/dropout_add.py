"""bias + dropout + residual: kernels of `megatron.ops.dropout_add`, which says how the mask follows from the seed.

Neither pass reads or writes a mask. The bias's gradient is added up in the same pass (two stages, see norms.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.dropout_add import ROUNDS, new_seed, threshold
from megatron.ops.triton.launch import Sample, as_rows, multiprocessors, operator, runs, start
from megatron.ops.triton.partials import sum_partials

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _words(seed, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the four words [ROWS, COLUMNS] of each counter."""
    zero = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    return tl.philox(tl.load(seed), zero + column[None, :], zero + row.to(tl.int32)[:, None], zero, zero, _ROUNDS)


@triton.jit
def _add_quarter(
    word,
    hidden,
    bias,
    residual,
    output,
    row,
    column,
    is_mine,
    rows,
    width,
    hidden_stride,
    residual_stride,
    least,
    scale,
):
    """Store a quarter of the columns. is_mine: of the columns that lie in this quarter and not in the next."""
    is_column = is_mine & (column < width)
    inside = (row[:, None] < rows) & is_column[None, :]
    values = tl.load(hidden + row[:, None] * hidden_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    added = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
    result = added.to(tl.float32) + tl.where(word >= least, values * scale, 0.0)
    tl.store(output + row[:, None] * width + column[None, :], result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    hidden, bias, residual, output, seed, rows, width, quarter, hidden_stride, residual_stride, least, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    least = least.to(tl.uint32)
    one, two, three, four = _words(seed, row, column, ROWS, COLUMNS)
    is_mine = column < quarter
    tensors = (hidden, bias, residual, output)
    numbers = (is_mine, rows, width, hidden_stride, residual_stride, least, scale)
    _add_quarter(one, *tensors, row, column, *numbers)
    _add_quarter(two, *tensors, row, column + quarter, *numbers)
    _add_quarter(three, *tensors, row, column + 2 * quarter, *numbers)
    _add_quarter(four, *tensors, row, column + 3 * quarter, *numbers)


@triton.jit
def _pass_quarter(word, gradient, hidden_gradient, row, column, is_mine, rows, width, stride, least, scale):
    """Store the gradient of a quarter of hidden's columns and return it."""
    inside = (row[:, None] < rows) & (is_mine & (column < width))[None, :]
    grad = tl.load(gradient + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    grad = tl.where(word >= least, grad * scale, 0.0)
    place = row[:, None] * width + column[None, :]
    tl.store(hidden_gradient + place, grad.to(hidden_gradient.dtype.element_ty), mask=inside)
    return grad


@triton.jit
def _backward(
    gradient, hidden_gradient, bias_partials, seed, rows, width, quarter, stride, least, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_mine = column < quarter
    least = least.to(tl.uint32)
    one_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    two_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    three_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    four_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(split * ROWS, rows, splits * ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        one, two, three, four = _words(seed, row, column, ROWS, COLUMNS)
        numbers = (is_mine, rows, width, stride, least, scale)
        one_sum += _pass_quarter(one, gradient, hidden_gradient, row, column, *numbers)
        two_sum += _pass_quarter(two, gradient, hidden_gradient, row, column + quarter, *numbers)
        three_sum += _pass_quarter(three, gradient, hidden_gradient, row, column + 2 * quarter, *numbers)
        four_sum += _pass_quarter(four, gradient, hidden_gradient, row, column + 3 * quarter, *numbers)
    if bias_partials is not None:
        place = bias_partials + split.to(tl.int64) * width + column
        tl.store(place, tl.sum(one_sum, axis=0), mask=is_mine)
        tl.store(place + quarter, tl.sum(two_sum, axis=0), mask=is_mine & (column + quarter < width))
        tl.store(place + 2 * quarter, tl.sum(three_sum, axis=0), mask=is_mine & (column + 2 * quarter < width))
        tl.store(place + 3 * quarter, tl.sum(four_sum, axis=0), mask=is_mine & (column + 3 * quarter < width))


def _tile(quarter: int) -> tuple[int, int]:
    columns = min(max(triton.next_power_of_2(quarter), 16), 1024)
    return max(1, 512 // columns), columns


@operator()
def dropout_forward(hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor) -> Tensor:
    """Return residual + dropout(hidden + bias), [rows, h]."""
    rows, width = hidden.shape
    output = hidden.new_empty(rows, width)
    if runs(output) and output.numel():
        quarter = triton.cdiv(width, 4)
        tile_rows, columns = _tile(quarter)
        grid = (triton.cdiv(rows, tile_rows), triton.cdiv(quarter, columns))
        numbers = (rows, width, quarter, hidden.stride(0), residual.stride(0), threshold(probability))
        shape = {"ROWS": tile_rows, "COLUMNS": columns, "num_warps": 4}
        start(_forward, grid, hidden, bias, residual, output, seed, *numbers, 1 / (1 - probability), **shape)
    return output


@operator()
def dropout_backward(gradient: Tensor, bias: Tensor | None, probability: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and bias; that of no bias is empty."""
    rows, width = gradient.shape
    hidden_gradient = gradient.new_empty(rows, width)
    quarter = triton.cdiv(width, 4)
    tile_rows, columns = _tile(quarter)
    across, splits = triton.cdiv(quarter, columns), triton.cdiv(rows, tile_rows)
    if bias is not None:
        splits = min(splits, triton.cdiv(8 * multiprocessors(gradient.device), across))
    partials = None if bias is None else gradient.new_empty(splits, width, dtype=torch.float32)
    if runs(gradient) and gradient.numel():
        numbers = (rows, width, quarter, gradient.stride(0), threshold(probability), 1 / (1 - probability))
        shape = {"ROWS": tile_rows, "COLUMNS": columns, "num_warps": 4}
        start(_backward, (splits, across), gradient, hidden_gradient, partials, seed, *numbers, **shape)
    if bias is None or partials is None:
        return hidden_gradient, gradient.new_empty(0)
    return hidden_gradient, sum_partials(partials, bias.dtype)


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(bias, seed)
        ctx.probability = probability
        output: Tensor = dropout_forward(as_rows(hidden), bias, as_rows(residual), probability, seed)
        return output.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        bias, seed = ctx.saved_tensors
        rows, biases = dropout_backward(as_rows(gradients[0]), bias, ctx.probability, seed)
        return rows.view(gradients[0].shape), biases if bias is not None else None, gradients[0], None, None


def add_dropped(
    hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor | None = None
) -> Tensor:
    """`megatron.ops.dropout_add.add_dropped`."""
    drawn = new_seed(hidden.device) if seed is None else seed
    output: Tensor = _AddDropped.apply(hidden, bias, residual, probability, drawn)
    return output


def samples() -> list[Sample]:
    """Hidden states of 4096 features, with the bias and without."""
    return [
        Sample(f"add_dropped{'' if biased else ' without bias'} 4096 bfloat16", partial(_sample, biased))
        for biased in (True, False)
    ]


def _sample(biased: bool, device: torch.device) -> None:
    hidden, residual = (
        torch.empty(16384, 4096, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2)
    )
    bias = torch.empty(4096, dtype=torch.bfloat16, device=device, requires_grad=True) if biased else None
    output = add_dropped(hidden, bias, residual, 0.1)
    output.backward(torch.empty_like(output))
