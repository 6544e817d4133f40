"""layer_norm and rms_norm, with and without the residual, in one pass each way: norms.cpp says how."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import norms
from megatron.ops.cpu.library import DTYPES, is_plain, kernel

Gradients = tuple[Tensor | None, ...]
Form = tuple[int, float, bool]
"""Values of a row, eps, and whether the mean is subtracted."""


def layer_norm(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`megatron.ops.norms.layer_norm`."""
    if not _serves(inputs, tuple(shape), weight, bias):
        return norms.layer_norm(inputs, shape, weight, bias, eps)
    output: Tensor = _Norm.apply(inputs, weight, bias, (math.prod(shape), eps, True))
    return output


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`megatron.ops.norms.rms_norm`; gains of several dims are PyTorch's."""
    if not _serves(inputs, inputs.shape[-1:], weight, None):
        return norms.rms_norm(inputs, weight, eps)
    output: Tensor = _Norm.apply(inputs, weight, None, (inputs.shape[-1], eps, False))
    return output


def add_layer_norm(
    inputs: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`megatron.ops.norms.add_layer_norm`."""
    if not _serves(inputs, inputs.shape[-1:], weight, bias) or not _is_alike(inputs, residual):
        return norms.add_layer_norm(inputs, residual, weight, bias, eps)
    result: tuple[Tensor, Tensor] = _AddNorm.apply(inputs, residual, weight, bias, (inputs.shape[-1], eps, True))
    return result


def add_rms_norm(inputs: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`megatron.ops.norms.add_rms_norm`."""
    if not _serves(inputs, inputs.shape[-1:], weight, None) or not _is_alike(inputs, residual):
        return norms.add_rms_norm(inputs, residual, weight, eps)
    result: tuple[Tensor, Tensor] = _AddNorm.apply(inputs, residual, weight, None, (inputs.shape[-1], eps, False))
    return result


def _serves(inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Return whether the kernels take these: inputs with values, and weights of `shape`, in their dtype or in fp32."""
    if weight is None:
        return bias is None and is_plain(inputs) and _ends_in(inputs, shape)
    if not (is_plain(inputs, weight) if bias is None else is_plain(inputs, weight, bias)):
        return False
    return (
        weight.dtype in (inputs.dtype, torch.float32)
        and weight.shape == shape
        and (bias is None or (bias.dtype == weight.dtype and bias.shape == shape))
        and _ends_in(inputs, shape)
    )


def _ends_in(inputs: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether its last dims, of which there is one at least and each has a value, are `shape`."""
    return bool(shape) and 0 not in shape and inputs.shape[-len(shape) :] == shape


def _is_alike(inputs: Tensor, residual: Tensor) -> bool:
    return is_plain(residual) and residual.dtype == inputs.dtype and residual.shape == inputs.shape


class _Norm(torch.autograd.Function):
    """Keeps its input, a mean and a scale of each row; rms_norm the scale alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> Tensor:
        values, output = inputs.contiguous(), torch.empty_like(inputs, memory_format=torch.contiguous_format)
        statistics = _compute(values, None, weight, bias, output, None, form)
        ctx.save_for_backward(inputs, weight, statistics)
        ctx.form = form
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        return *_gradients(ctx, upstream, None, ctx.needs_input_grad[1:3]), None


class _AddNorm(torch.autograd.Function):
    """Keeps the sum that it returns, and the same numbers of each row."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form
    ) -> tuple[Tensor, Tensor]:
        inputs, residual = inputs.contiguous(), residual.contiguous()
        output, total = torch.empty_like(inputs), torch.empty_like(inputs)
        statistics = _compute(inputs, residual, weight, bias, output, total, form)
        ctx.save_for_backward(total, weight, statistics)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, above: Tensor | None) -> Gradients:
        if upstream is None:
            return above, above, None, None, None
        gradient, *others = _gradients(ctx, upstream, above, ctx.needs_input_grad[2:4])
        return gradient, gradient, *others, None


def _compute(
    inputs: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, output: Tensor,
    total: Tensor | None, form: Form,
) -> Tensor:  # fmt: skip
    """Fill the output with the norm of inputs + residual, and `total` with that sum; return what is kept of rows."""
    width, eps, centred = form
    rows = inputs.numel() // width
    statistics = torch.empty(2 * rows if centred else rows, dtype=torch.float32)
    kernel("deepy_norm", "pppppppiiiiif")(
        inputs.data_ptr(), _address(residual), _address(weight), _address(bias), output.data_ptr(), _address(total),
        statistics.data_ptr(), *_types(inputs, weight), centred, rows, width, eps,
    )  # fmt: skip
    return statistics


def _gradients(ctx: Any, upstream: Tensor, above: Tensor | None, needed: tuple[bool, bool]) -> Gradients:
    """Return the gradients of what was normed, of weight and bias. above: of what was normed, from elsewhere."""
    values, weight, statistics = ctx.saved_tensors
    width, _, centred = ctx.form
    values, upstream = values.contiguous(), upstream.contiguous()
    above = None if above is None else above.contiguous()
    gradient = torch.empty_like(values)
    weight_gradient, bias_gradient = (torch.empty_like(weight) if each else None for each in needed)
    kernel("deepy_norm_gradient", "ppppppppiiiii")(
        values.data_ptr(), statistics.data_ptr(), _address(weight), upstream.data_ptr(), _address(above),
        gradient.data_ptr(), _address(weight_gradient), _address(bias_gradient),
        *_types(values, weight), centred, values.numel() // width, width,
    )  # fmt: skip
    return gradient, weight_gradient, bias_gradient


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _types(values: Tensor, weight: Tensor | None) -> tuple[int, int]:
    """Return the numbers of the dtypes of what is normed and of the weights."""
    number = DTYPES[values.dtype]
    return number, number if weight is None else DTYPES[weight.dtype]
