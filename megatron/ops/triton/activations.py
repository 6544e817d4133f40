"""bias + GELU (erf and tanh), bias + SwiGLU and GeGLU: kernels of `megatron.ops.activations`.

    plain   y = act(x + b)                     dx = dy act'(x + b)
    gated   [u; g] = x + b;  y = act(g) u      du = dy act(g);  dg = dy u act'(g)

db is the sum of dx over the rows, added up in the same pass over memory (see norms.py for the two stages). The sum
x + b, the function and its slope are fp32.
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

GELU, GELU_TANH, SILU = 0, 1, 2
_ERF = tl.constexpr(GELU)
_TANH = tl.constexpr(GELU_TANH)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """Return act(x) and act'(x)."""
    if KIND == _ERF:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == _TANH:  # 1/2 + 1/2 tanh(u) = sigmoid(2 u)
        share = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627265 * x * x))
        slope = share + x * share * (1 - share) * (1.5957691216057308 + 0.21406444881795 * x * x)
    else:
        share = tl.sigmoid(x)
        slope = share + x * share * (1 - share)
    return x * share, slope


@triton.jit
def _forward(
    inputs, bias, output, rows, width, stride,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    inside = (row[:, None] < rows) & is_column[None, :]
    place = row[:, None] * stride + column[None, :]
    gate = tl.load(inputs + place + (width if GATED else 0), mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        gate += tl.load(bias + column + (width if GATED else 0), mask=is_column, other=0.0).to(tl.float32)[None, :]
    result, _ = _activate(gate, KIND)
    if GATED:
        value = tl.load(inputs + place, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        result = result * value
    tl.store(output + row[:, None] * width + column[None, :], result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gradient, inputs, bias, input_gradient, bias_partials, rows, width, gradient_stride, stride,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    wide = width * 2 if GATED else width
    second = width if GATED else 0
    gate_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    value_sum = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if bias is not None:
        gate_bias = tl.load(bias + column + second, mask=is_column, other=0.0).to(tl.float32)
        value_bias = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    for begin in range(split * ROWS, rows, splits * ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (row[:, None] < rows) & is_column[None, :]
        place = row[:, None] * stride + column[None, :]
        target = row[:, None] * wide + column[None, :]
        grad = tl.load(gradient + row[:, None] * gradient_stride + column[None, :], mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        gate = tl.load(inputs + place + second, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            gate += gate_bias[None, :]
        result, slope = _activate(gate, KIND)
        if GATED:
            value = tl.load(inputs + place, mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                value += value_bias[None, :]
            result = grad * result
            tl.store(input_gradient + target, result.to(input_gradient.dtype.element_ty), mask=inside)
            value_sum += result
            grad = grad * value
        grad = grad * slope
        tl.store(input_gradient + target + second, grad.to(input_gradient.dtype.element_ty), mask=inside)
        gate_sum += grad
    if bias is not None:
        place = split.to(tl.int64) * wide + column
        tl.store(bias_partials + place + second, tl.sum(gate_sum, axis=0), mask=is_column)
        if GATED:
            tl.store(bias_partials + place, tl.sum(value_sum, axis=0), mask=is_column)


def _tile(width: int, elements: int) -> tuple[int, int]:
    """Return rows and columns of a tile of about that many elements."""
    columns = min(max(triton.next_power_of_2(width), 16), 1024)
    return max(1, elements // columns), columns


@operator()
def activation_forward(inputs: Tensor, bias: Tensor | None, kind: int, gated: bool) -> Tensor:
    """Return the activation [rows, f] of inputs [rows, f], or [rows, 2 f] where gated."""
    rows, width = inputs.shape[0], inputs.shape[1] // (2 if gated else 1)
    output = inputs.new_empty(rows, width)
    if runs(output) and output.numel():
        tile_rows, columns = _tile(width, 2048)
        grid = (triton.cdiv(rows, tile_rows), triton.cdiv(width, columns))
        shape = {"KIND": kind, "GATED": gated, "ROWS": tile_rows, "COLUMNS": columns, "num_warps": 4}
        start(_forward, grid, inputs, bias, output, rows, width, inputs.stride(0), **shape)
    return output


@operator()
def activation_backward(
    gradient: Tensor, inputs: Tensor, bias: Tensor | None, kind: int, gated: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of inputs and bias; that of no bias is empty."""
    rows, width = gradient.shape
    input_gradient = inputs.new_empty(inputs.shape)
    tile_rows, columns = _tile(width, 1024 if gated else 2048)
    across = triton.cdiv(width, columns)
    splits = triton.cdiv(rows, tile_rows)
    if bias is not None:
        splits = min(splits, triton.cdiv(8 * multiprocessors(inputs.device), across))
    partials = inputs.new_empty(splits if bias is not None else 0, inputs.shape[1], dtype=torch.float32)
    if runs(gradient) and gradient.numel():
        shape = {"KIND": kind, "GATED": gated, "ROWS": tile_rows, "COLUMNS": columns, "num_warps": 4}
        tensors = (gradient, inputs, bias, input_gradient, partials)
        start(_backward, (splits, across), *tensors, rows, width, gradient.stride(0), inputs.stride(0), **shape)
    if bias is None:
        return input_gradient, partials.new_empty(0, dtype=inputs.dtype)
    return input_gradient, sum_partials(partials, bias.dtype)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, kind: int, gated: bool) -> Tensor:
        rows = as_rows(inputs)
        output: Tensor = activation_forward(rows, bias, kind, gated)
        ctx.save_for_backward(rows, bias)
        ctx.kind, ctx.gated, ctx.shape = kind, gated, inputs.shape
        return output.view(*inputs.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, bias = ctx.saved_tensors
        changes = activation_backward(as_rows(gradients[0]), inputs, bias, ctx.kind, ctx.gated)
        return changes[0].view(ctx.shape), changes[1] if bias is not None else None, None, None


def bias_gelu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_gelu`."""
    output: Tensor = _Activation.apply(inputs, bias, GELU, False)
    return output


def bias_gelu_tanh(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_gelu_tanh`."""
    output: Tensor = _Activation.apply(inputs, bias, GELU_TANH, False)
    return output


def bias_swiglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_swiglu`."""
    output: Tensor = _Activation.apply(inputs, bias, SILU, True)
    return output


def bias_geglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_geglu`."""
    output: Tensor = _Activation.apply(inputs, bias, GELU, True)
    return output


def samples() -> list[Sample]:
    """The MLPs of GPT-NeoX and LLaMA at hidden size 4096, with bias and without."""
    functions = {"bias_gelu": (bias_gelu, 16384), "bias_gelu_tanh": (bias_gelu_tanh, 16384)}
    functions |= {"bias_swiglu": (bias_swiglu, 22016), "bias_geglu": (bias_geglu, 22016)}
    return [
        Sample(f"{name}{'' if biased else ' without bias'} {width} bfloat16", partial(_sample, function, width, biased))
        for name, (function, width) in functions.items()
        for biased in (True, False)
    ]


def _sample(function: Any, width: int, biased: bool, device: torch.device) -> None:
    inputs = torch.empty(16384, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.empty(width, dtype=torch.bfloat16, device=device, requires_grad=True) if biased else None
    output = function(inputs, bias)
    output.backward(torch.empty_like(output))
