"""Rows of a table: y = W[tokens];   dW[t] = sum of dy over the places of t, zero for tokens that do not occur."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.memory import take_gradient


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return W[tokens] [..., h] from tokens [...] int64 and W [v, h]. On a CPU the gradient's memory is used again."""
    trained = torch.is_grad_enabled() and weight.requires_grad
    if weight.device.type != "cpu" or not trained or torch.compiler.is_compiling():
        return F.embedding(tokens, weight)
    rows: Tensor = _Rows.apply(tokens, weight)
    return rows


class _Rows(torch.autograd.Function):
    """The formulae at the top."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        tokens, weight = ctx.saved_tensors
        return None, take_gradient(weight).zero_().index_add_(0, tokens.flatten(), upstream.flatten(0, -2))
