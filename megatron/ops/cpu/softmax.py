"""Softmax of scaled scores of what causality and a window let each query see, in one pass: attention.cpp says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import softmax
from megatron.ops.cpu.library import DTYPES, is_plain, kernel


def masked_softmax(
    scores: Tensor, scale: float, causal: bool = False, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """`megatron.ops.softmax.masked_softmax`; a mask is left to that."""
    if mask is not None or not causal or not is_plain(scores):
        return softmax.masked_softmax(scores, scale, causal, window, mask)
    output: Tensor = _SeenSoftmax.apply(scores, scale, _bounds(scores.shape[2], scores.shape[3], window))
    return output


def _bounds(num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """Return the first and the last key that each query sees, [2, q] int32."""
    last = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32)
    return torch.stack((last - (min(window or num_keys, num_keys) - 1), last))


class _SeenSoftmax(torch.autograd.Function):
    """Keeps the probabilities."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float, bounds: Tensor) -> Tensor:
        scores = scores.contiguous()
        output = torch.empty_like(scores)
        kernel("deepy_seen_softmax", "ppippipfiiiiii")(
            scores.data_ptr(), output.data_ptr(), DTYPES[scores.dtype], bounds[0].data_ptr(), bounds[1].data_ptr(), 0,
            None, scale, *scores.shape, 0, 0,
        )  # fmt: skip
        ctx.save_for_backward(output, bounds)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        output, bounds = ctx.saved_tensors
        upstream, gradient = upstream.contiguous(), torch.empty_like(output)
        kernel("deepy_seen_softmax_gradient", "pppippifiiiii")(
            output.data_ptr(), upstream.data_ptr(), gradient.data_ptr(), DTYPES[output.dtype], bounds[0].data_ptr(),
            bounds[1].data_ptr(), 0, ctx.scale, *output.shape, 0,
        )  # fmt: skip
        return gradient, None, None
