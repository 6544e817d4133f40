"""RMS norm on a CPU, in blocks of rows that stay in its cache.

    s = 1 / sqrt(mean(x^2) + eps);   y = s x w
    dw = sum over rows of dy s x;    dx = s (dy w - s x mean(dy w s x))

PyTorch has no kernel of it there: it runs the formula pass by pass, each over all of memory, and keeps what is between
them. Here the same passes run over a block at a time, in fp32, and s alone is kept. Where there is a C++ compiler, one
pass of `cpu/norms.py` takes the place of them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SIZE = 2**18
"""Values of a block, for each thread. With fewer the calls take longer than the sums, with more the cache is left."""

SMALLEST = 2**17
"""Values from which on blocks are faster than PyTorch's passes."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_for(inputs: Tensor, weight: Tensor) -> bool:
    """Return whether `rms_norm` is the faster way here."""
    return (
        inputs.device.type == "cpu"
        and inputs.numel() >= SMALLEST
        and inputs.dtype in _DTYPES
        and weight.dim() == 1
        and not torch.compiler.is_compiling()
    )


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm over the last dim; inputs [..., h], weight [h]."""
    output: Tensor = _RMSNorm.apply(inputs, weight, eps)
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        scales = rows.new_empty((len(rows), 1), dtype=torch.float32)
        gains = weight.float()
        for block in _blocks(rows):
            values, scale = rows[block].float(), scales[block]
            torch.linalg.vector_norm(values, dim=1, keepdim=True, out=scale)
            scale.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
            target = output[block]
            if target.dtype == torch.float32:
                torch.mul(values, scale, out=target).mul_(gains)
            else:
                target.copy_(values.mul_(scale).mul_(gains))
        ctx.save_for_backward(inputs, weight, scales)
        return output.view(inputs.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, weight, scales = ctx.saved_tensors
        rows = inputs.reshape(-1, inputs.shape[-1])
        gradient = upstream[0].reshape(rows.shape)
        input_gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        weight_gradient = rows.new_zeros(rows.shape[1], dtype=torch.float32)
        gains = weight.float()
        for block in _blocks(rows):
            _backward(rows[block], gradient[block], gains, scales[block], input_gradient[block], weight_gradient)
        return input_gradient.view(inputs.shape), weight_gradient.to(weight.dtype), None


def _backward(
    rows: Tensor, gradient: Tensor, gains: Tensor, scale: Tensor, input_gradient: Tensor, weight_gradient: Tensor
) -> None:
    """Write dx of a block of rows [r, h] and add its part of dw [h]; gains [h] and scale [r, 1] are fp32."""
    gradient = gradient.float()
    # PyTorch's products of two dtypes are slower than a conversion by itself.
    normed = rows * scale if rows.dtype == torch.float32 else rows.float().mul_(scale)
    products = gradient * normed
    weight_gradient.addmv_(products.t(), torch.ones_like(scale).squeeze(1))
    normed.mul_(torch.mv(products, gains).div_(-rows.shape[1]).unsqueeze(1))
    torch.addcmul(normed, gradient, gains, out=products)
    if rows.dtype == torch.float32:
        torch.mul(products, scale, out=input_gradient)
    else:
        input_gradient.copy_(products.mul_(scale))


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_SIZE * torch.get_num_threads() // rows.shape[1])
    return (slice(start, start + size) for start in range(0, len(rows), size))
