"""Activations with their bias in one pass, and their gradients in another: activations.cpp says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import activations
from megatron.ops.activations import BiasActivation
from megatron.ops.cpu.library import DTYPES, is_plain, kernel

KINDS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}
"""The numbers that the kernels know activations by (activations.cpp)."""

_CHUNK = 64
"""Rows whose part of the bias' gradient is summed by itself (activations.cpp)."""


def bias_gelu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_gelu`."""
    return _activated(inputs, bias, "gelu", False, activations.bias_gelu)


def bias_gelu_tanh(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_gelu_tanh`."""
    return _activated(inputs, bias, "gelu_tanh", False, activations.bias_gelu_tanh)


def bias_swiglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_swiglu`."""
    return _activated(inputs, bias, "silu", True, activations.bias_swiglu)


def bias_geglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_geglu`."""
    return _activated(inputs, bias, "gelu", True, activations.bias_geglu)


def _activated(inputs: Tensor, bias: Tensor | None, kind: str, gated: bool, eager: BiasActivation) -> Tensor:
    tensors = (inputs,) if bias is None else (inputs, bias)
    if not is_plain(*tensors) or (bias is not None and (bias.dtype != inputs.dtype or bias.shape != inputs.shape[-1:])):
        return eager(inputs, bias)
    output: Tensor = _BiasActivation.apply(inputs, bias, KINDS[kind], gated)
    return output


class _BiasActivation(torch.autograd.Function):
    """Keeps its input; the sum with the bias is made again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, kind: int, gated: bool) -> Tensor:
        inputs, wide = inputs.contiguous(), _in_fp32(bias)
        width = inputs.shape[-1]
        size = width // 2 if gated else width
        output = inputs.new_empty(*inputs.shape[:-1], size)
        kernel("deepy_bias_activation", "pppiiiii")(
            inputs.data_ptr(), None if wide is None else wide.data_ptr(), output.data_ptr(),
            DTYPES[inputs.dtype], kind, gated, _rows(inputs), size,
        )  # fmt: skip
        ctx.save_for_backward(inputs, bias)
        ctx.how = kind, gated
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, bias = ctx.saved_tensors
        kind, gated = ctx.how
        above, gradient = upstream[0].contiguous(), torch.empty_like(inputs)
        rows, width = _rows(inputs), inputs.shape[-1]
        sums = bias is not None and ctx.needs_input_grad[1]
        partial = inputs.new_empty(-(-rows // _CHUNK), width, dtype=torch.float32) if sums else None
        bias_gradient = torch.empty_like(bias) if sums else None
        tensors = (inputs, _in_fp32(bias), above, gradient, partial, bias_gradient)
        kernel("deepy_bias_activation_gradient", "ppppppiiiii")(
            *(None if each is None else each.data_ptr() for each in tensors),
            DTYPES[inputs.dtype], kind, gated, rows, width // 2 if gated else width,
        )  # fmt: skip
        return gradient, bias_gradient, None, None


def _in_fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def _rows(inputs: Tensor) -> int:
    """Return the rows of [..., f]."""
    return inputs.numel() // max(1, inputs.shape[-1])
