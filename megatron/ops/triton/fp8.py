"""What stands before a product in float8, in two passes over a tensor: its largest value, and its rounding.

The first pass reads; each program leaves the largest value that it met, compared as bits, whose order as integers is
that of the numbers and puts nan above all. In the second pass each program takes the maximum of those few, makes the
scale of it, and writes its tile as it is, turned, or both: for an element of bf16 that is kept both ways, 4 bytes are
read and 2 written. Nothing waits for the host, and there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.fp8 import CAPABILITY, GRADIENTS, MULTIPLE, SMALLEST, VALUES, linear_by
from megatron.ops.triton.launch import INTERPRETED, Sample, multiprocessors, operator, runs, start

BLOCK = 8192
"""Elements that a program of the first pass reads at once."""

PROGRAMS = 4
"""Programs of the first pass on a multiprocessor."""

TILE = 128
"""Rows and columns of a tile of the second pass: what is turned is written in lines of 128 bytes."""

_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def _measure(values, largest, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.int32)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    while begin < count:
        value = tl.load(values + begin + lanes, mask=begin + lanes < count, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        begin += tl.num_programs(0).to(tl.int64) * BLOCK
    tl.store(largest + tl.program_id(0), tl.max(most, axis=0).to(tl.float32, bitcast=True))


@triton.jit
def _nearest(value, FRACTION: tl.constexpr, LEAST: tl.constexpr):
    """Return the nearest number with FRACTION bits behind its first, or multiple of 2^(LEAST - FRACTION), ties to even.

    Triton's interpreter cuts and carries wrongly where the instruction of a GPU rounds; of such numbers both make the
    same. LEAST: exponent of the least normal number.
    """
    bits = value.to(tl.int32, bitcast=True)
    dropped: tl.constexpr = 23 - FRACTION
    rounded = (bits + (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)) >> dropped << dropped
    normal = rounded.to(tl.float32, bitcast=True)
    anchor: tl.constexpr = 1.5 * 2.0 ** (LEAST + 23 - FRACTION)
    return tl.where(tl.abs(value) < 2.0**LEAST, value + anchor - anchor, normal)


@triton.jit
def _cast(
    values, largest, plain, turned, inverse, rows, columns, filled, num_largest,
    MOST: tl.constexpr, TYPE: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr, LARGEST: tl.constexpr,
    TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """MOST: the largest number of TYPE. filled: rows, up to a multiple of 16. LARGEST: at least num_largest."""
    each = tl.arange(0, LARGEST)
    bits = tl.load(largest + each, mask=each < num_largest, other=0.0).to(tl.int32, bitcast=True)
    bound = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    bound = tl.maximum(bound, _SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(tl.full((), MOST, tl.float32), bound)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse, tl.div_rn(tl.full((), 1.0, tl.float32), scale))
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = row[:, None] * columns + column[None, :]
    scaled = tl.load(values + place, mask=inside, other=0.0).to(tl.float32) * scale
    if INTERPRETED:
        scaled = _nearest(
            scaled, TYPE.fp_mantissa_width, 2 - 2 ** (TYPE.primitive_bitwidth - TYPE.fp_mantissa_width - 2)
        )
    small = scaled.to(TYPE)
    if PLAIN:
        tl.store(plain + place, small, mask=inside)
    if TURNED:
        inside = (column[:, None] < columns) & (row[None, :] < filled)
        tl.store(turned + column[:, None] * filled + row[None, :], tl.trans(small), mask=inside)


@operator()
def float8_measure(values: Tensor) -> Tensor:
    """Return the largest absolute values that the programs met in `values`, contiguous: `megatron.ops.fp8.measure`."""
    blocks = triton.cdiv(max(1, values.numel()), BLOCK)
    programs = min(blocks, PROGRAMS * multiprocessors(values.device))
    largest = values.new_empty(programs, dtype=torch.float32)
    if runs(values):
        start(_measure, (programs,), values, largest, values.numel(), BLOCK=BLOCK, num_warps=8)
    return largest


@operator()
def float8_cast(
    values: Tensor, largest: Tensor, is_gradient: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`megatron.ops.fp8.cast` of values [r, c], contiguous."""
    rows, columns = values.shape
    dtype = GRADIENTS if is_gradient else VALUES
    filled = triton.cdiv(rows, MULTIPLE) * MULTIPLE
    as_it_is = values.new_empty((rows, columns) if plain else (0,), dtype=dtype)
    across = values.new_empty((columns, filled) if turned else (0,), dtype=dtype)
    inverse = values.new_empty((), dtype=torch.float32)
    if runs(values):
        grid = (max(1, triton.cdiv(filled, TILE)), max(1, triton.cdiv(columns, TILE)))
        constants = {
            "MOST": torch.finfo(dtype).max,
            "TYPE": tl.float8e5 if is_gradient else tl.float8e4nv,
            "PLAIN": plain,
            "TURNED": turned,
            "LARGEST": triton.next_power_of_2(len(largest)),
            "TILE": TILE,
            "INTERPRETED": INTERPRETED,
        }
        tensors = (values, largest, as_it_is, across, inverse)
        start(_cast, grid, *tensors, rows, columns, filled, len(largest), **constants, num_warps=8)
    return as_it_is, across, inverse


float8_linear = linear_by(float8_measure, float8_cast)
"""`megatron.ops.fp8.float8_linear`."""


def samples() -> list[Sample]:
    """The first linear map of an MLP, 2048 to 8192 features."""
    return [Sample("float8_linear 2048 to 8192 bfloat16", _sample, 10 * CAPABILITY[0] + CAPABILITY[1])]


def _sample(device: torch.device) -> None:
    shapes = (16384, 2048), (8192, 2048)
    inputs, weight = (torch.empty(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes)
    output = float8_linear(inputs, weight)
    output.backward(torch.empty_like(output))
