"""The linear map whose three products are computed in 8 bit floating point, each tensor with one scale of its own.

    q(t) = float8(s t)                      s = M / max(largest |t|, 1e-12), and M the largest number of the type
    y  = q(x) q(W)^T / (s_x s_W) + b        x and W in e4m3: M = 448, 4 significant bits
    dx = q(dy) q(W) / (s_dy s_W)            dy in e5m2: M = 57344, 3 significant bits
    dW = q(dy)^T q(x) / (s_dy s_x)          db = sum of the rows of dy, in its own type

Types: Micikevicius et al. 2022, "FP8 formats for deep learning". A scale follows from the values themselves at every
call, on the device ("dynamic, tensorwise", the default recipe of torchao.float8): no history, no state to save.
Sums are fp32. A product takes its left factor by rows and its right one by columns, so a tensor is written as it is
(`plain`) and turned; what waits for the backward pass is q(x) turned, a byte for each element where bf16 keeps two.

Both features must be multiples of 16 (`fits`), or the layer is computed as it is without float8. Rows, where they are
the inner dim, are filled up with zeros. A GPU needs compute capability 8.9; elsewhere than on a GPU PyTorch computes
the same numbers without 8 bit arithmetic, slower than in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.linear import linear

VALUES = torch.float8_e4m3fn
"""The type of inputs and weights."""

GRADIENTS = torch.float8_e5m2
"""The type of gradients, which have the wider range."""

SMALLEST = 1e-12
"""The least largest value of a tensor that a scale is made of: zeros alone must not divide by zero."""

MULTIPLE = 16
"""Features that cuBLAS's float8 products come in."""

CAPABILITY = (8, 9)
"""The least compute capability with float8 products: Ada (8.9), Hopper (9.0) and later."""

Measure = Callable[[Tensor], Tensor]
"""values [r, c] -> numbers whose maximum is the largest absolute value, fp32; nan where there is one."""

Cast = Callable[[Tensor, Tensor, bool, bool, bool], tuple[Tensor, Tensor, Tensor]]
"""See `cast`."""


def fits(weight: Tensor) -> bool:
    """Return whether products with a weight [out, in] can be computed in float8."""
    return weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0


def obstacle(device: torch.device) -> str:
    """Return why a device cannot compute float8 products, or ""."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return "GPUs of AMD have other float8 types than e4m3fn and e5m2, which are not built in this version."
    capability = torch.cuda.get_device_capability(device)
    if capability >= CAPABILITY:
        return ""
    name = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    return f"{name}, and float8 products need {CAPABILITY[0]}.{CAPABILITY[1]} (Ada), 9.0 (Hopper) or later."


def float8_linear_reference(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula: values rounded to float8 and back, multiplied in their own type."""
    if not fits(weight):
        return linear(inputs, weight, bias)
    product: Tensor = _RoundGradient.apply(F.linear(_Round.apply(inputs), _Round.apply(weight)))
    return product if bias is None else product + bias


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as float8 holds them with the tensor's scale, in their own type."""
    scale = scale_of(values.abs().max().float(), dtype)
    return ((values.float() * scale).to(dtype).float() / scale).to(values.dtype)


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a tensor is multiplied by before it is rounded to a float8 type. largest: fp32."""
    # a number divided by a tensor is that number times the reciprocal to PyTorch, which rounds twice
    return torch.full_like(largest, torch.finfo(dtype).max) / largest.clamp(min=SMALLEST)


class _Round(torch.autograd.Function):
    """Rounded on the way forward, nothing on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return rounded(values, VALUES)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0]


class _RoundGradient(torch.autograd.Function):
    """Nothing on the way forward, rounded on the way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return rounded(gradient[0], GRADIENTS)


def measure(values: Tensor) -> Tensor:
    """Return the largest absolute value [1] of a tensor, fp32."""
    return values.abs().amax().float().view(1)


def cast(
    values: Tensor, largest: Tensor, is_gradient: bool, plain: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values [r, c] in float8, as [r, c] and turned as [c, r filled up to a multiple of 16], and 1 / scale.

    largest: of `measure`. is_gradient: in the type of gradients. plain, turned: which to make; the other one is empty.
    """
    dtype = GRADIENTS if is_gradient else VALUES
    scale = scale_of(largest.amax(), dtype)
    small = (values.float() * scale).to(dtype)
    nothing = small.new_empty(0)
    filled = F.pad(small.t().view(torch.uint8), (0, -len(values) % MULTIPLE)).view(dtype) if turned else nothing
    return small if plain else nothing, filled.contiguous(), scale.reciprocal()


def linear_by(measure: Measure, cast: Cast) -> Callable[..., Tensor]:
    """Return the linear map of the formulae at the top, with these two for what comes before a product."""

    class Product(torch.autograd.Function):
        """x [rows, in], W [out, in] and b [out] -> y [rows, out]. keep: there will be a backward pass."""

        @staticmethod
        def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
            of_weight = measure(weight)
            small, turned, inverse = cast(inputs, measure(inputs), False, True, keep)
            small_weight, _, inverse_weight = cast(weight, of_weight, False, True, False)
            ctx.save_for_backward(turned, inverse, weight, of_weight)
            return _product(small, small_weight.t(), inverse, inverse_weight, inputs.dtype, bias, fast=True)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            inputs, inverse_inputs, weight, of_weight = ctx.saved_tensors
            needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
            gradient = upstream[0].contiguous()
            small, turned, inverse = cast(gradient, measure(gradient), True, needs_input, needs_weight)
            to_input = to_weight = None
            if needs_input:
                _, by_columns, inverse_weight = cast(weight, of_weight, False, False, True)
                to_input = _product(small, by_columns.t(), inverse, inverse_weight, gradient.dtype)
            if needs_weight:
                to_weight = _product(turned, inputs.t(), inverse, inverse_inputs, weight.dtype)
            return to_input, to_weight, gradient.sum(0) if needs_bias else None, None

    def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b [..., out] from x [..., in], W [out, in] and b [out], multiplied in float8."""
        if not fits(weight):
            return linear(inputs, weight, bias)
        rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        result: Tensor = Product.apply(rows, weight, bias, torch.is_grad_enabled())
        return result.view(*inputs.shape[:-1], len(weight))

    return product


def _product(
    left: Tensor,
    right: Tensor,
    inverse_left: Tensor,
    inverse_right: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """Return left [n, k] by rows times right [k, m] by columns, each times its 1 / scale, plus bias, in `dtype`.

    fast: sums may be kept in the tensor cores' registers, with fewer bits than fp32: precise enough forward only.
    """
    result: Tensor = torch._scaled_mm(
        left, right, scale_a=inverse_left, scale_b=inverse_right, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )
    return result


float8_linear = linear_by(measure, cast)
"""The linear map in float8 by PyTorch's own operations."""
