"""Vocabulary projection and cross entropy in one, without ever holding all logits.

    logits = x W^T;   loss = logsumexp(logits) - logits[label];   d loss / d logits = softmax(logits) - onehot(label)

The tokens are taken in chunks: the logits of a chunk are computed in the input's dtype, turned into fp32 losses and, in
the same memory, into their gradient. `linear_cross_entropy_sum` finishes the gradients of x and W during the forward
pass, because the loss of a language model is one weighted sum; it costs no recomputation. `linear_cross_entropy`
returns each token's loss, whose gradient is not known in advance, and computes the logits again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Size of the fp32 logits of one chunk; larger chunks were not faster on 2 CPU cores (benchmarks/train.py)."""

FP16_GRADIENT_SCALE = 1024.0
"""softmax(logits) of a large vocabulary is below the least normal fp16 number, so fp16 gradients are kept scaled."""


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Return sum(loss * loss_mask) over all tokens, an fp32 scalar.

    hidden [..., h], weight [v, h], labels [...] int64 in [0, v), loss_mask [...] fp32.
    """
    hidden, labels, loss_mask = hidden.flatten(0, -2), labels.flatten(), loss_mask.flatten().float()
    result: Tensor = _WeightedSum.apply(hidden, weight, labels, loss_mask, torch.is_grad_enabled())
    return result


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return each token's loss [...] fp32; hidden [..., h], weight [v, h], labels [...] int64 in [0, v)."""
    losses: Tensor = _PerToken.apply(hidden.flatten(0, -2), weight, labels.flatten())
    return losses.view(labels.shape)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The formula, with all logits in fp32."""
    logits = F.linear(hidden, weight).float()
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _chunk_tokens(weight: Tensor) -> int:
    """Return how many tokens' fp32 logits fit a chunk."""
    return max(1, CHUNK_BYTES // (4 * weight.shape[0]))


def _chunk_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fp32 logits [c, v] of a chunk, their logsumexp [c] and the losses [c]."""
    logits = F.linear(hidden, weight).float()
    normaliser = torch.logsumexp(logits, dim=-1)
    return logits, normaliser, normaliser - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def _logits_gradient(logits: Tensor, normaliser: Tensor, labels: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Overwrite fp32 logits [c, v] with factor * (softmax - onehot) and return it as `dtype`; factor [c]."""
    gradient = logits.sub_(normaliser.unsqueeze(1)).exp_()
    gradient.mul_(factor.unsqueeze(1))
    gradient.scatter_add_(1, labels.unsqueeze(1), -factor.unsqueeze(1))
    return gradient.to(dtype)


def _gradient_scale(dtype: torch.dtype) -> float:
    return FP16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


class _WeightedSum(torch.autograd.Function):
    """sum(mask * loss), whose gradients are finished in the forward pass up to the factor that arrives from above."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, with_gradient: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        scale = _gradient_scale(hidden.dtype)
        need_hidden, need_weight = (needed and with_gradient for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        size = _chunk_tokens(weight)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits, normaliser, losses = _chunk_losses(hidden[rows], weight, labels[rows])
            total += torch.dot(losses, loss_mask[rows])
            if not need_hidden and not need_weight:
                continue
            gradient = _logits_gradient(logits, normaliser, labels[rows], loss_mask[rows] * scale, hidden.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[rows])
            if weight_gradient is not None:
                _accumulate(weight_gradient, gradient, hidden[rows])
        ctx.hidden_gradient, ctx.weight_gradient = hidden_gradient, weight_gradient
        ctx.scale, ctx.dtype = scale, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream[0] / ctx.scale
        hidden, weight = ctx.hidden_gradient, ctx.weight_gradient
        ctx.hidden_gradient = ctx.weight_gradient = None
        if hidden is not None:
            hidden = (hidden * factor.to(torch.float32)).to(ctx.dtype)
        if weight is not None:
            weight = weight.mul_(factor).to(ctx.dtype)
        return hidden, weight, None, None, None


class _PerToken(torch.autograd.Function):
    """Each token's loss; the backward pass recomputes the logits chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        size = _chunk_tokens(weight)
        chunks = zip(hidden.split(size), labels.split(size), strict=True)
        return torch.cat([_chunk_losses(rows, weight, targets)[2] for rows, targets in chunks])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        scale = _gradient_scale(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        size = _chunk_tokens(weight)
        # The factors are brought to at most 1 before the cast to the input's dtype, and given back after it.
        largest = upstream[0].abs().max().clamp(min=1e-30)
        factors = upstream[0] / largest * scale
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits, normaliser, _ = _chunk_losses(hidden[rows], weight, labels[rows])
            gradient = _logits_gradient(logits, normaliser, labels[rows], factors[rows], hidden.dtype)
            torch.mm(gradient, weight, out=hidden_gradient[rows])
            _accumulate(weight_gradient, gradient, hidden[rows])
        factor = largest / scale
        return (hidden_gradient * factor).to(hidden.dtype), weight_gradient.mul_(factor).to(weight.dtype), None


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient^T hidden to the fp32 `total` [v, h]; gradient [c, v], hidden [c, h]."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.t(), hidden)
    else:
        total.add_(torch.mm(gradient.t(), hidden))
