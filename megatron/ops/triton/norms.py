"""layer_norm and rms_norm, with the addition of the residual before them: kernels of `megatron.ops.norms`.

    t = x + r  (rounded to its dtype)      y = (t - mean) * scale * weight + bias      scale = 1 / sqrt(var + eps)
    g = dy * weight                        dx = dr = dt + scale * (g - mean(g) - n * mean(g n)),  n = (t - mean) * scale
    dweight = sum over rows of dy * n      dbias = sum over rows of dy

rms_norm has neither mean nor mean(g). Statistics are fp32. A row of up to 32768 (backward 8192) features stays in
registers; wider ones are read again, from L2 where they fit. Sums over rows have two stages and no atomics: each
program adds up its own rows, then `sum_partials` adds the programs, in an order that depends on the shape alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.triton.launch import Sample, as_rows, multiprocessors, operator, runs, start
from megatron.ops.triton.partials import sum_partials

WHOLE_FORWARD = 32768
WHOLE_BACKWARD = 8192
CHUNK = 4096


@triton.jit
def _forward(
    inputs, residual, weight, bias, output, total, mean, scale, rows, width, input_stride, residual_stride, eps,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    values = tl.load(inputs + row[:, None] * input_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        rounded = (values + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * width + column[None, :], rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTRED:
        average = tl.sum(values, axis=1) / width
        tl.store(mean + row, average, mask=row < rows)
        values = tl.where(inside, values - average[:, None], 0.0)
    factor = 1 / tl.sqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(scale + row, factor, mask=row < rows)
    values = values * factor[:, None]
    if weight is not None:
        values = values * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        values = values + tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(output + row[:, None] * width + column[None, :], values.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _forward_wide(
    inputs, residual, weight, bias, output, total, mean, scale, rows, width, input_stride, residual_stride, eps,
    CENTRED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inputs += row * input_stride
    total += row * width
    count, average, squares = 0.0, 0.0, 0.0
    for begin in range(0, width, COLUMNS):  # mean and squared deviations, chunk joined to chunk (Chan et al. 1979)
        column = begin + tl.arange(0, COLUMNS)
        inside = column < width
        values = tl.load(inputs + column, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            added = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            rounded = (values + added).to(total.dtype.element_ty)
            tl.store(total + column, rounded, mask=inside)
            values = rounded.to(tl.float32)
        if CENTRED:
            size = tl.minimum(width - begin, COLUMNS).to(tl.float32)
            chunk_average = tl.sum(values, axis=0) / size
            values = tl.where(inside, values - chunk_average, 0.0)
            difference = chunk_average - average
            average += difference * size / (count + size)
            squares += difference * difference * count * size / (count + size)
            count += size
        squares += tl.sum(values * values, axis=0)
    factor = 1 / tl.sqrt(squares / width + eps)
    if CENTRED:
        tl.store(mean + row, average)
    tl.store(scale + row, factor)
    if residual is not None:
        inputs = total
        tl.debug_barrier()  # what other threads of the program have stored is read below
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = column < width
        values = (tl.load(inputs + column, mask=inside, other=0.0).to(tl.float32) - average) * factor
        if weight is not None:
            values = values * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            values = values + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + row * width + column, values.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gradient, total_gradient, values, weight, mean, scale, input_gradient, weight_partials, bias_partials,
    rows, width, gradient_stride, total_stride, value_stride,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    weight_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if weight is not None:
        gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    for begin in range(program * ROWS, rows, programs * ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        normed = tl.load(values + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(gradient + row[:, None] * gradient_stride + column[None, :], mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
        if CENTRED:
            normed = normed - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        normed = normed * factor[:, None]
        if weight is not None:
            weight_sum += grad * normed
            if bias_partials is not None:
                bias_sum += grad
            grad = grad * gain[None, :]
        change = grad - normed * (tl.sum(grad * normed, axis=1) / width)[:, None]
        if CENTRED:
            change = change - (tl.sum(grad, axis=1) / width)[:, None]
        change = change * factor[:, None]
        if total_gradient is not None:
            passed = tl.load(total_gradient + row[:, None] * total_stride + column[None, :], mask=inside, other=0.0)
            change = change + passed.to(tl.float32)
        change = change.to(input_gradient.dtype.element_ty)
        tl.store(input_gradient + row[:, None] * width + column[None, :], change, mask=inside)
    place = program.to(tl.int64) * width + column
    if weight is not None:
        tl.store(weight_partials + place, tl.sum(weight_sum, axis=0), mask=column < width)
        if bias_partials is not None:
            tl.store(bias_partials + place, tl.sum(bias_sum, axis=0), mask=column < width)


@triton.jit
def _backward_wide(
    gradient, total_gradient, values, weight, mean, scale, input_gradient,
    width, gradient_stride, total_stride, value_stride,
    CENTRED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor, average = tl.load(scale + row), 0.0
    if CENTRED:
        average = tl.load(mean + row)
    grad_sum, product_sum = 0.0, 0.0
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = column < width
        normed = (
            tl.load(values + row * value_stride + column, mask=inside, other=0.0).to(tl.float32) - average
        ) * factor
        grad = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            grad = grad * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        product_sum += tl.sum(grad * normed, axis=0)
        if CENTRED:
            grad_sum += tl.sum(grad, axis=0)
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = column < width
        normed = (
            tl.load(values + row * value_stride + column, mask=inside, other=0.0).to(tl.float32) - average
        ) * factor
        grad = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            grad = grad * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        change = (grad - normed * (product_sum / width) - grad_sum / width) * factor
        if total_gradient is not None:
            change += tl.load(total_gradient + row * total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(input_gradient + row * width + column, change.to(input_gradient.dtype.element_ty), mask=inside)


@triton.jit
def _weight_partials(
    gradient, values, mean, scale, weight_partials, bias_partials, rows, width, gradient_stride, value_stride,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    weight_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(split * ROWS, rows, splits * ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        normed = tl.load(values + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(gradient + row[:, None] * gradient_stride + column[None, :], mask=inside, other=0.0)
        if CENTRED:
            normed = normed - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        weight_sum += grad.to(tl.float32) * normed * tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        if bias_partials is not None:
            bias_sum += grad.to(tl.float32)
    place = split.to(tl.int64) * width + column
    tl.store(weight_partials + place, tl.sum(weight_sum, axis=0), mask=column < width)
    if bias_partials is not None:
        tl.store(bias_partials + place, tl.sum(bias_sum, axis=0), mask=column < width)


def _tile(width: int, features: int = 1024) -> tuple[int, int, int]:
    """Return rows and columns of a program's tile and its warps: about 16 features of the row to a thread."""
    columns = max(triton.next_power_of_2(width), 16)
    rows = max(1, features // columns)
    return rows, columns, min(32, max(2, rows * columns // 512))


@operator()
def norm_forward(
    inputs: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm inputs + residual [rows, h]; return the output, the sum (empty without residual), mean and scale [rows]."""
    rows, width = inputs.shape
    output = inputs.new_empty(rows, width)
    total = inputs.new_empty((rows, width) if residual is not None else (0,))
    mean = inputs.new_empty(rows if centred else 0, dtype=torch.float32)
    scale = inputs.new_empty(rows, dtype=torch.float32)
    if runs(output) and rows:
        residual_stride = 0 if residual is None else residual.stride(0)
        tensors = (inputs, residual, weight, bias, output, total, mean, scale)
        numbers = (rows, width, inputs.stride(0), residual_stride, eps)
        if width > WHOLE_FORWARD:
            start(_forward_wide, (rows,), *tensors, *numbers, CENTRED=centred, COLUMNS=CHUNK, num_warps=8)
        else:
            tile_rows, columns, warps = _tile(width)
            grid = (triton.cdiv(rows, tile_rows),)
            shape = {"CENTRED": centred, "ROWS": tile_rows, "COLUMNS": columns, "num_warps": warps}
            start(_forward, grid, *tensors, *numbers, **shape)
    return output, total, mean, scale


@operator()
def norm_backward(
    gradient: Tensor, total_gradient: Tensor | None, values: Tensor, weight: Tensor | None, mean: Tensor,
    scale: Tensor, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of inputs [rows, h], weight and bias (empty where there is none).

    values: the sum that was normed. total_gradient: of that sum, from elsewhere.
    """
    rows, width = gradient.shape
    centred, device = mean.numel() > 0, gradient.device
    input_gradient = values.new_empty(rows, width)
    programs = min(rows, _programs(width, device)) if weight is not None else 0
    weight_partials = scale.new_empty(programs, width)
    bias_partials = scale.new_empty(programs, width) if has_bias else None
    if runs(gradient) and rows:
        total_stride = 0 if total_gradient is None else total_gradient.stride(0)
        strides = (gradient.stride(0), total_stride, values.stride(0))
        tensors = (gradient, total_gradient, values, weight, mean, scale, input_gradient)
        if width > WHOLE_BACKWARD:
            shape = {"CENTRED": centred, "COLUMNS": CHUNK, "num_warps": 8}
            start(_backward_wide, (rows,), *tensors, width, *strides, **shape)
            if weight is not None:
                partials = (gradient, values, mean, scale, weight_partials, bias_partials)
                shape = {"CENTRED": centred, "ROWS": 16, "COLUMNS": 128, "num_warps": 4}
                start(
                    _weight_partials,
                    (triton.cdiv(width, 128), programs),
                    *partials,
                    rows,
                    width,
                    strides[0],
                    strides[2],
                    **shape,
                )
        else:
            tile_rows, columns, warps = _tile(width)
            grid = (programs or min(rows, _programs(width, device)),)
            shape = {"CENTRED": centred, "ROWS": tile_rows, "COLUMNS": columns, "num_warps": warps}
            start(_backward, grid, *tensors, weight_partials, bias_partials, rows, width, *strides, **shape)
    dtype = values.dtype if weight is None else weight.dtype
    weight_gradient = sum_partials(weight_partials, dtype) if weight is not None else scale.new_empty(0, dtype=dtype)
    bias_gradient = sum_partials(bias_partials, dtype) if bias_partials is not None else scale.new_empty(0, dtype=dtype)
    return input_gradient, weight_gradient, bias_gradient


def _programs(width: int, device: torch.device) -> int:
    """Return how many programs share the rows of a backward pass: as many as run side by side."""
    if width > WHOLE_BACKWARD:
        return 16
    return multiprocessors(device) * (2 if width > 2048 else 4)


class _Norm(torch.autograd.Function):
    """The norm alone. Not the sum's function without one: torch.compile wants a tensor for each output."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        rows = as_rows(inputs)
        output, _, mean, scale = norm_forward(rows, None, weight, bias, eps, centred)
        ctx.save_for_backward(rows, weight, mean, scale)
        ctx.has_bias = bias is not None
        result: Tensor = output.view(inputs.shape)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, scale = ctx.saved_tensors
        inputs, weights, biases = norm_backward(as_rows(gradients[0]), None, values, weight, mean, scale, ctx.has_bias)
        of_weight, of_bias = weights if weight is not None else None, biases if ctx.has_bias else None
        return inputs.view(gradients[0].shape), of_weight, of_bias, None, None


class _AddNorm(torch.autograd.Function):
    """The norm of a sum, and the sum."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output, total, mean, scale = norm_forward(as_rows(inputs), as_rows(residual), weight, bias, eps, centred)
        ctx.save_for_backward(total, weight, mean, scale)
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        return output.view(inputs.shape), total.view(inputs.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, total_gradient = gradients
        if gradient is None:
            return total_gradient, total_gradient, None, None, None, None
        values, weight, mean, scale = ctx.saved_tensors
        passed = None if total_gradient is None else as_rows(total_gradient)
        changes = norm_backward(as_rows(gradient), passed, values, weight, mean, scale, ctx.has_bias)
        inputs = changes[0].view(gradient.shape)
        of_weight, of_bias = changes[1] if weight is not None else None, changes[2] if ctx.has_bias else None
        return inputs, inputs, of_weight, of_bias, None, None


def layer_norm(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`megatron.ops.norms.layer_norm`, over the last dim or dims."""
    flat = inputs.flatten(-len(shape))
    gains, offsets = (None if each is None else each.flatten() for each in (weight, bias))
    output: Tensor = _Norm.apply(flat, gains, offsets, eps, True)
    return output.view(inputs.shape)


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`megatron.ops.norms.rms_norm`, for weight [h]."""
    output: Tensor = _Norm.apply(inputs, weight, None, eps, False)
    return output


def add_layer_norm(
    inputs: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`megatron.ops.norms.add_layer_norm`."""
    result: tuple[Tensor, Tensor] = _AddNorm.apply(inputs, residual, weight, bias, eps, True)
    return result


def add_rms_norm(inputs: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`megatron.ops.norms.add_rms_norm`."""
    result: tuple[Tensor, Tensor] = _AddNorm.apply(inputs, residual, weight, None, eps, False)
    return result


def samples() -> list[Sample]:
    """The norms of hidden states from 125M to 13B parameters, and one beyond a program's registers."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        *(_named("add_layer_norm", True, width, bf16) for width in (768, 4096, 8192, 16384)),
        *(_named("add_rms_norm", False, width, dtype) for width, dtype in ((4096, bf16), (8192, bf16), (4096, fp32))),
    ]


def _named(name: str, centred: bool, width: int, dtype: torch.dtype) -> Sample:
    return Sample(f"{name} {width} {str(dtype).removeprefix('torch.')}", partial(_sample, centred, width, dtype))


def _sample(centred: bool, width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, residual = (torch.empty(16384, width, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.empty(width, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    pair = (
        add_layer_norm(inputs, residual, weight, bias, 1e-5)
        if centred
        else add_rms_norm(inputs, residual, weight, 1e-5)
    )
    torch.autograd.backward(pair, [torch.empty_like(each) for each in pair])
