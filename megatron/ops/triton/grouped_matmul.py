"""Matrix products of groups of rows, each with a matrix of its own: the experts of a mixture.

    y[rows of e] = x[rows of e] W[e];   dx[rows of e] = dy[rows of e] W[e]^T;   dW[e] = x[rows of e]^T dy[rows of e]

Rows are sorted by expert, and `offsets` says on the device where each expert's begin: nothing is read by the host. A
launch has as many programs as there could be tiles of rows (one more for each expert than rows fill); a program finds
its expert by counting tiles. Sums are fp32; fp32 factors are multiplied in full precision.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.triton.launch import INTERPRETED, Sample, architecture, as_rows, operator, runs, start

GROUP = 4 if INTERPRETED else 8
"""Tiles of rows that are computed side by side."""


@triton.jit
def _find(tile, offsets, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the expert of a tile of ROWS rows, the tile's first row and the expert's row after the last.

    A tile beyond the last has the expert num_experts.
    """
    experts = tl.arange(0, EXPERTS)
    exists = experts < num_experts
    starts = tl.load(offsets + experts, mask=exists, other=0)
    stops = tl.load(offsets + experts + 1, mask=exists, other=0)
    tiles = (stops - starts + ROWS - 1) // ROWS
    last_tiles = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((last_tiles <= tile) & exists).to(tl.int32), axis=0)
    is_mine = experts == expert
    earlier = tl.sum(tl.where(is_mine, last_tiles - tiles, 0), axis=0)
    start = tl.sum(tl.where(is_mine, starts, 0), axis=0)
    stop = tl.sum(tl.where(is_mine, stops, 0), axis=0)
    return expert, start + (tile - earlier) * ROWS, stop


@triton.jit
def _dot(left, right, sums, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Return sums + left right; UPCAST: products of fp32, because the interpreter cannot multiply bf16."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def _rows(
    inputs, weights, offsets, outputs, num_experts, num_columns, depth,
    input_stride, weight_stride_e, weight_stride_k, weight_stride_n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the same columns of GROUP tiles of rows, so that they share the weights in L2.
    num_programs = GROUP * tl.cdiv(num_columns, COLUMNS)
    program = tl.program_id(0) % num_programs
    tile = tl.program_id(0) // num_programs * GROUP + program % GROUP
    expert, first, stop = _find(tile, offsets, num_experts, ROWS, EXPERTS)
    if expert < num_experts:
        # Large numbers are added to scalar pointers; within a tile 32 bits are enough.
        rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        depths = tl.arange(0, DEPTH)
        first_column = program // GROUP * COLUMNS
        row_inside = rows[:, None] < (stop - first).to(tl.int32)
        column_inside = columns[None, :] < num_columns - first_column
        left = inputs + first.to(tl.int64) * input_stride
        right = weights + expert.to(tl.int64) * weight_stride_e + first_column.to(tl.int64) * weight_stride_n
        left_places = rows[:, None] * input_stride + depths[None, :]
        right_places = depths[:, None] * weight_stride_k + columns[None, :] * weight_stride_n
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, depth, DEPTH):
            inside = depths < depth - begin
            a = tl.load(left + left_places, mask=row_inside & inside[None, :], other=0.0)
            b = tl.load(right + right_places, mask=inside[:, None] & column_inside, other=0.0)
            sums = _dot(a, b, sums, UPCAST, PRECISION)
            left += DEPTH
            right += DEPTH * weight_stride_k
        output = outputs + first.to(tl.int64) * num_columns + first_column
        places = rows[:, None] * num_columns + columns[None, :]
        tl.store(output + places, sums.to(outputs.dtype.element_ty), mask=row_inside & column_inside)


@triton.jit
def _weights(
    inputs, upstream, offsets, gradient, num_rows, num_columns, input_stride, upstream_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    num_column_tiles = tl.cdiv(num_columns, COLUMNS)
    first_row = tl.program_id(0) // num_column_tiles * ROWS
    first_column = tl.program_id(0) % num_column_tiles * COLUMNS
    rows, columns, tokens = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    row_inside = rows[:, None] < num_rows - first_row
    column_inside = columns[None, :] < num_columns - first_column
    first, stop = tl.load(offsets + expert).to(tl.int64), tl.load(offsets + expert + 1).to(tl.int64)
    count = (stop - first).to(tl.int32)
    left = inputs + first * input_stride + first_row
    right = upstream + first * upstream_stride + first_column
    left_places = tokens[None, :] * input_stride + rows[:, None]
    right_places = tokens[:, None] * upstream_stride + columns[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, count, DEPTH):
        inside = tokens < count - begin
        a = tl.load(left + left_places, mask=row_inside & inside[None, :], other=0.0)
        b = tl.load(right + right_places, mask=inside[:, None] & column_inside, other=0.0)
        sums = _dot(a, b, sums, UPCAST, PRECISION)
        left += DEPTH * input_stride
        right += DEPTH * upstream_stride
    output = gradient + (expert.to(tl.int64) * num_rows + first_row) * num_columns + first_column
    places = rows[:, None] * num_columns + columns[None, :]
    tl.store(output + places, sums.to(gradient.dtype.element_ty), mask=row_inside & column_inside)


@operator()
def grouped_matmul_rows(inputs: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return [t, n] from inputs [t, k], weights [e, k, n] of any strides and offsets [e + 1] int64."""
    num_experts, depth, num_columns = weights.shape
    output = torch.empty((len(inputs), num_columns), dtype=inputs.dtype, device=inputs.device)
    if runs(output):
        inputs, tile = as_rows(inputs), _tile(inputs, num_columns)
        num_tiles = triton.cdiv(len(inputs), tile["ROWS"]) + num_experts
        start(
            _rows,
            (triton.cdiv(num_tiles, GROUP) * GROUP * triton.cdiv(num_columns, tile["COLUMNS"]),),
            inputs,
            weights,
            offsets.contiguous(),
            output,
            num_experts,
            num_columns,
            depth,
            inputs.stride(0),
            *weights.stride(),
            EXPERTS=triton.next_power_of_2(num_experts),
            GROUP=GROUP,
            **tile,
        )
    return output


@operator()
def grouped_matmul_weights(inputs: Tensor, upstream: Tensor, offsets: Tensor) -> Tensor:
    """Return [e, k, n]: inputs[rows of e]^T upstream[rows of e], from [t, k] and [t, n]; zeros for an empty expert."""
    num_experts, num_rows, num_columns = len(offsets) - 1, inputs.shape[1], upstream.shape[1]
    output = torch.empty((num_experts, num_rows, num_columns), dtype=inputs.dtype, device=inputs.device)
    if runs(output):
        inputs, upstream, tile = as_rows(inputs), as_rows(upstream), _tile(inputs, num_columns)
        num_tiles = triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(num_columns, tile["COLUMNS"])
        start(
            _weights,
            (num_tiles, num_experts),
            inputs,
            upstream,
            offsets.contiguous(),
            output,
            num_rows,
            num_columns,
            inputs.stride(0),
            upstream.stride(0),
            **tile,
        )
    return output


def _tile(like: Tensor, num_columns: int) -> dict[str, Any]:
    """Return a tile's size and how its products are computed; fp32 needs twice the shared memory of bf16.

    Before Hopper a product's factors stand in registers, of which there are too few for 64 deep tiles."""
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
    exact = {"UPCAST": INTERPRETED, "PRECISION": precision}
    if INTERPRETED:
        return {"ROWS": 16, "COLUMNS": 16, "DEPTH": 16, **exact}
    if like.dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, **exact, "num_warps": 4, "num_stages": 3}
    columns = 256 if num_columns >= 256 else 128
    depth = 64 if architecture(like.device) >= 90 else 32
    return {"ROWS": 128, "COLUMNS": columns, "DEPTH": depth, **exact, "num_warps": 8, "num_stages": 3}


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weights, offsets)
        output: Tensor = grouped_matmul_rows(inputs, weights, offsets)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights, offsets = ctx.saved_tensors
        needs_inputs, needs_weights, _ = ctx.needs_input_grad
        return (
            grouped_matmul_rows(upstream[0], weights.transpose(1, 2), offsets) if needs_inputs else None,
            grouped_matmul_weights(inputs, upstream[0], offsets) if needs_weights else None,
            None,
        )


def grouped_matmul(inputs: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """`megatron.ops.grouped_gemm.grouped_matmul`, for tensors of one dtype."""
    output: Tensor = _GroupedMatmul.apply(inputs, weights, offsets)
    return output


def samples() -> list[Sample]:
    """Eight experts of a model with hidden 4096."""
    return [
        Sample(f"grouped_matmul {str(dtype).removeprefix('torch.')}", partial(_sample, dtype))
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _sample(dtype: torch.dtype, device: torch.device) -> None:
    inputs = torch.empty(16384, 4096, dtype=dtype, device=device, requires_grad=True)
    weights = torch.empty(8, 4096, 14336, dtype=dtype, device=device, requires_grad=True)
    output = grouped_matmul(inputs, weights, torch.empty(9, dtype=torch.int64, device=device))
    output.backward(torch.empty_like(output))
