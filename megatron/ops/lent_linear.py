"""The linear map by a lent weight: one whose memory goes after the forward pass and comes again before the backward.

    dx = dy W      dW = dy^T x      db = sum of the rows of dy

ZeRO 3 gathers a weight for its layer's forward pass, gives the parameter empty memory behind it, and gathers it anew
for the layer's backward pass. PyTorch's linear map keeps W^T for dx, a view of the memory that W had: all matrices of
the model would stay gathered until their backward passes. This one keeps the parameter, with whatever memory it has by
then, as the maps of oneDNN and float8 do.

Its operations are those that PyTorch's own is made of, so outputs and gradients are the same bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ATTRIBUTE = "is_lent"


def lend(weight: Tensor) -> None:
    """Let `megatron.ops.linear.linear` keep no view of this parameter, wherever nothing is compiled."""
    setattr(weight, _ATTRIBUTE, True)


def is_lent(weight: Tensor) -> bool:
    """Return whether `lend` was called."""
    return hasattr(weight, _ATTRIBUTE)


def lent_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b [..., out] from x [..., in], a parameter W [out, in] and b [out].

    A weight that is changed in place before the backward pass is an error there, as PyTorch's own; new memory is none.
    """
    result: Tensor = _LentLinear.apply(inputs, weight, bias)
    return result


class _LentLinear(torch.autograd.Function):
    """The formulae at the top."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = upstream.reshape(-1, upstream.shape[-1])
        return (
            gradient.mm(weight).view(inputs.shape) if needs_input else None,
            gradient.t().mm(inputs.reshape(-1, inputs.shape[-1])) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )
