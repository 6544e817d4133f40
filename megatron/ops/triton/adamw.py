"""AdamW in one pass over any number of tensors, and the sum of squares that clipping needs; nothing waits for the host.

A launch is given a table of addresses and sizes in device memory; a program takes SPAN consecutive elements of one
tensor and finds it by its number. One pass reads gradient, master and both moments and writes master, moments and the
weight: 30 bytes for an element with a bf16 weight, 28 where the gradient is bf16 too. The clip coefficient and the bias
corrections come from device memory, and the learning rate may; where the coefficient is not finite, nothing is written.
Sums are made in a fixed order. Moments in bf16, which save 8 of the bytes, are rounded at random by the bits that
`megatron.ops.adamw.noise` makes.

Tables are kept, since a step's tensors mostly lie where those of the last one lay. A CUDA graph reads the table that
was there when it was recorded, so whoever records has done the same before, on the stream of the recording.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.adamw import GOLDEN, MIX1, MIX2, bias_corrections, decay_of, noise_key
from megatron.ops.triton.launch import Sample, operator, runs, start

SPAN = 16384
"""Elements of a program."""

BLOCK = 1024
"""Elements that a program handles at once, with 4 warps: 32 bytes of each thread's in fp32."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _find(table, num_tensors, TENSORS: tl.constexpr, SPAN: tl.constexpr):
    """Return the tensor of this program, its first element and the tensor's size.

    The table's first row holds sizes in elements, its second the number of the programs up to and with each tensor.
    """
    program = tl.program_id(0)
    tensors = tl.arange(0, TENSORS)
    exists = tensors < num_tensors
    last = tl.load(table + num_tensors + tensors, mask=exists, other=0)
    is_before = exists & (last <= program)
    tensor = tl.sum(is_before.to(tl.int32), axis=0)
    earlier = tl.max(tl.where(is_before, last, 0), axis=0)
    return tensor, (program - earlier).to(tl.int64) * SPAN, tl.load(table + tensor)


@triton.jit
def _pointer(table, row, num_tensors, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address in a row of the table; ALIGNED: it is a multiple of 16 bytes."""
    pointer = tl.load(table + row * num_tensors + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares(
    table, partial, num_tensors,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, TENSORS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of a program's elements, fp64."""
    tensor, first, size = _find(table, num_tensors, TENSORS, SPAN)
    values = _pointer(table, 2, num_tensors, tensor, TYPE, ALIGNED) + first
    count = tl.minimum(size - first, SPAN).to(tl.int32)
    whole = count // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, whole, BLOCK):
        value = tl.load(values + begin + lanes).to(tl.float32)
        sums += value * value
    value = tl.load(values + whole + lanes, mask=whole + lanes < count, other=0.0).to(tl.float32)
    sums += value * value
    tl.store(partial + tl.program_id(0), tl.sum(sums.to(tl.float64), axis=0))


@triton.jit
def _total(partial, total, count, BLOCK: tl.constexpr):
    """One program: the sum of all partial sums, fp64."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        sums += tl.load(partial + begin + lanes, mask=begin + lanes < count, other=0.0)
    tl.store(total, tl.sum(sums, axis=0))


@triton.jit
def _mixed(bits, MIX1: tl.constexpr, MIX2: tl.constexpr):
    """The finaliser of MurmurHash3 on uint32."""
    bits = (bits ^ (bits >> 16)) * tl.full((), MIX1, tl.uint32)
    bits = (bits ^ (bits >> 13)) * tl.full((), MIX2, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(values, bits):
    """fp32 values rounded to bf16 at random; bits: uint32 in [0, 2^16)."""
    return ((values.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _update(
    gradients, masters, averages, squares, weights, offsets, mask, coefficient, decay, step_size, inverse_root,
    one_minus_beta1, beta2, eps, first, key,
    HAS_WEIGHTS: tl.constexpr, AT_RANDOM: tl.constexpr, GOLDEN: tl.constexpr, MIX1: tl.constexpr, MIX2: tl.constexpr,
):  # fmt: skip
    """Update a block of elements; AT_RANDOM: the moments are bf16."""
    gradient = tl.load(gradients + offsets, mask=mask).to(tl.float32) * coefficient
    average = tl.load(averages + offsets, mask=mask).to(tl.float32)
    average += one_minus_beta1 * (gradient - average)
    square = tl.load(squares + offsets, mask=mask).to(tl.float32)
    square = beta2 * square + (1.0 - beta2) * gradient * gradient
    master = tl.load(masters + offsets, mask=mask) * decay
    master -= step_size * average / (tl.sqrt(square) * inverse_root + eps)
    if AT_RANDOM:
        elements = (first + offsets).to(tl.uint32)
        bits = _mixed(elements * tl.full((), GOLDEN, tl.uint32) + key, MIX1, MIX2)
        average = _rounded(average, bits & 0xFFFF)
        square = _rounded(square, bits >> 16)
    tl.store(averages + offsets, average.to(averages.dtype.element_ty), mask=mask)
    tl.store(squares + offsets, square.to(squares.dtype.element_ty), mask=mask)
    tl.store(masters + offsets, master, mask=mask)
    if HAS_WEIGHTS:
        tl.store(weights + offsets, master.to(weights.dtype.element_ty), mask=mask)


@triton.jit
def _adamw(
    table, coefficients, corrections, keys, rates, num_tensors, rate, one_minus_beta1, beta2, eps, decay, first_number,
    GRADIENT_TYPE: tl.constexpr, WEIGHT_TYPE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, MOMENT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, GOLDEN: tl.constexpr, MIX1: tl.constexpr, MIX2: tl.constexpr, TENSORS: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a program's elements. coefficients [1]; corrections [2], of `bias_corrections`; keys [1], of `noise_key`.
    rates [2]: rate and decay, in the place of those two, or None. first_number: of the first tensor, for the random
    bits."""
    coefficient = tl.load(coefficients)
    if tl.abs(coefficient) < float("inf"):
        tensor, first, size = _find(table, num_tensors, TENSORS, SPAN)
        if rates is not None:
            rate, decay = tl.load(rates), tl.load(rates + 1)
        gradients = _pointer(table, 2, num_tensors, tensor, GRADIENT_TYPE, ALIGNED) + first
        masters = _pointer(table, 3, num_tensors, tensor, tl.float32, ALIGNED) + first
        averages = _pointer(table, 4, num_tensors, tensor, MOMENT_TYPE, ALIGNED) + first
        squares = _pointer(table, 5, num_tensors, tensor, MOMENT_TYPE, ALIGNED) + first
        weights = masters
        if HAS_WEIGHTS:
            weights = _pointer(table, 6, num_tensors, tensor, WEIGHT_TYPE, ALIGNED) + first
        at_random: tl.constexpr = MOMENT_TYPE == tl.bfloat16
        number = (first_number + tensor).to(tl.uint32)
        key = _mixed(tl.load(keys).to(tl.uint32, bitcast=True) + number * tl.full((), MIX1, tl.uint32), MIX1, MIX2)
        step_size, inverse_root = rate * tl.load(corrections), tl.load(corrections + 1)
        count = tl.minimum(size - first, SPAN).to(tl.int32)
        whole = count // BLOCK * BLOCK
        lanes = tl.arange(0, BLOCK)
        # fmt: off
        for begin in range(0, whole, BLOCK):
            _update(gradients, masters, averages, squares, weights, begin + lanes, None, coefficient, decay,
                    step_size, inverse_root, one_minus_beta1, beta2, eps, first, key, HAS_WEIGHTS, at_random, GOLDEN,
                    MIX1, MIX2)
        if whole < count:
            _update(gradients, masters, averages, squares, weights, whole + lanes, whole + lanes < count, coefficient,
                    decay, step_size, inverse_root, one_minus_beta1, beta2, eps, first, key, HAS_WEIGHTS, at_random,
                    GOLDEN, MIX1, MIX2)
        # fmt: on


@operator()
def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, an fp64 scalar on the device, always summed in the same order.

    tensors: contiguous, of one dtype and one device.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    if runs(total) and any(tensor.numel() for tensor in tensors):
        table, num_programs, aligned = _table([tensors])
        partial = total.new_empty(num_programs)
        constants = {"ALIGNED": aligned, "TENSORS": triton.next_power_of_2(len(tensors)), "SPAN": SPAN, "BLOCK": BLOCK}
        kind = _TYPES[tensors[0].dtype]
        start(_squares, (num_programs,), table, partial, len(tensors), TYPE=kind, **constants, num_warps=4)
        start(_total, (1,), partial, total, num_programs, BLOCK=BLOCK, num_warps=4)
    return total


def adamw_update_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = 0,
    first: int = 0,
) -> None:
    """Update masters and moments, and round the masters into the weights; see `megatron.ops.adamw.adamw_update_`.

    gradients: fp32, bf16 or fp16, all of one dtype."""
    number, rates = rate, None
    if isinstance(rate, Tensor):
        number, rates = 0.0, torch.stack((rate, torch.as_tensor(decay_of(rate, weight_decay))))
    settings = (beta1, beta2, eps, weight_decay, seed, first)
    adamw_step(gradients, masters, averages, squares, weights, coefficient, step, rates, number, *settings)


@operator(mutates=("masters", "averages", "squares", "weights"))
def adamw_step(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rates: Tensor | None,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = 0,
    first: int = 0,
) -> None:
    """Do `adamw_update_`. rates: rate and decay as an fp32 tensor [2], or None where `rate` is the rate."""
    if not runs(coefficient) or not any(tensor.numel() for tensor in masters):
        return
    table, num_programs, aligned = _table([gradients, masters, averages, squares, *([weights] if weights else [])])
    start(
        _adamw,
        (num_programs,),
        table,
        coefficient,
        bias_corrections(step, beta1, beta2),
        noise_key(seed, step),
        rates,
        len(masters),
        rate,
        1.0 - beta1,
        beta2,
        eps,
        1.0 - rate * weight_decay,
        first,
        GRADIENT_TYPE=_TYPES[gradients[0].dtype],
        WEIGHT_TYPE=_TYPES[weights[0].dtype] if weights else tl.float32,
        HAS_WEIGHTS=bool(weights),
        MOMENT_TYPE=_TYPES[averages[0].dtype],
        ALIGNED=aligned,
        GOLDEN=GOLDEN,
        MIX1=MIX1,
        MIX2=MIX2,
        TENSORS=triton.next_power_of_2(len(masters)),
        SPAN=SPAN,
        BLOCK=BLOCK,
        num_warps=4,
    )


_Table = tuple[Tensor, int, bool]

_tables: dict[tuple[object, ...], _Table] = {}
"""The last tables by what they follow from, those used last at the end."""

_recorded: list[_Table] = []
"""Tables that CUDA graphs read, a few KB each; kept for ever, since nobody says when a graph is gone."""

_MOST_TABLES = 32


def _table(columns: list[list[Tensor]]) -> _Table:
    """Return (sizes, programs so far, addresses of each list) as int64 [2 + lists, tensors] on the device, the number
    of programs, and whether all addresses are multiples of 16 bytes.

    Raises RuntimeError where a CUDA graph is recorded and there is no such table yet.
    """
    device = columns[0][0].device
    is_cuda = device.type == "cuda"
    sizes = tuple(tensor.numel() for tensor in columns[0])
    addresses = tuple(tuple(tensor.data_ptr() for tensor in column) for column in columns)
    key = (device, torch.cuda.current_stream(device) if is_cuda else None, SPAN, sizes, addresses)
    is_recording = is_cuda and torch.cuda.is_current_stream_capturing()
    if is_recording and key not in _tables:
        raise RuntimeError("a recorded update must find its tensors where they lay in the update before it")
    found = _tables.pop(key, None) or _made(sizes, addresses, device)
    _tables[key] = found
    if len(_tables) > _MOST_TABLES:
        del _tables[next(iter(_tables))]
    if is_recording:
        _recorded.append(found)
    return found


def _made(sizes: tuple[int, ...], addresses: tuple[tuple[int, ...], ...], device: torch.device) -> _Table:
    """Return a new table; it is copied without waiting."""
    programs, num_programs = [], 0
    for size in sizes:
        num_programs += triton.cdiv(size, SPAN)
        programs.append(num_programs)
    aligned = all(address % 16 == 0 for column in addresses for address in column)
    table = torch.tensor([sizes, programs, *addresses], dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table.to(device), num_programs, aligned


def samples() -> list[Sample]:
    """Masters with bf16 weights, also with bf16 moments, and fp32 weights that are their own masters; what a CUDA graph
    records, of bf16 gradients."""
    return [
        Sample("adamw bfloat16 weights and gradients, recorded", partial(_sample, True, torch.float32, True)),
        Sample("adamw bfloat16 weights", partial(_sample, True, torch.float32, False)),
        Sample("adamw bfloat16 weights and moments", partial(_sample, True, torch.bfloat16, False)),
        Sample("adamw", partial(_sample, False, torch.float32, False)),
    ]


def _sample(has_weights: bool, moments: torch.dtype, recorded: bool, device: torch.device) -> None:
    lists = [[torch.empty(4096, 4096, device=device) for _ in range(100)] for _ in range(4)]
    weights = [tensor.bfloat16() for tensor in lists[0]] if has_weights else []
    sum_of_squares(lists[0])
    coefficient, step = (torch.empty((), device=device) for _ in range(2))
    lists[2:] = [[tensor.to(moments) for tensor in each] for each in lists[2:]]
    if recorded:
        lists[0] = weights
    rate = torch.empty((), device=device) if recorded else 1e-4
    gradients, masters, averages, squares = lists
    adamw_update_(gradients, masters, averages, squares, weights, coefficient, step, rate, 0.9, 0.95, 1e-8, 0.1)
