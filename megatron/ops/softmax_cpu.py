"""Masked softmax on a CPU, in blocks of heads that stay in its cache.

    p = softmax(scale x) where seen, else 0;      dx = scale p (dp - sum_j dp p)

The formula's passes (scaling, masking, softmax, masking) each go over all of memory, in fp32, and autograd keeps what
is between them. Here the same passes run over a block at a time, and p alone is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SIZE = 2**18
"""Scores of a block."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_for(scores: Tensor) -> bool:
    """Return whether `masked_softmax` computes this."""
    return scores.device.type == "cpu" and scores.dtype in _DTYPES and not torch.compiler.is_compiling()


def masked_softmax(scores: Tensor, scale: float, hidden: Tensor | None, all_see: bool) -> Tensor:
    """Return the probabilities of scores [b, n, q, k], in their dtype.

    hidden: bool, True is not seen, broadcasts to [b, n, q, k]; or None. all_see: every query sees a key.
    """
    output: Tensor = _MaskedSoftmax.apply(scores, scale, hidden, all_see)
    return output


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float, hidden: Tensor | None, all_see: bool) -> Tensor:
        output = torch.empty_like(scores, memory_format=torch.contiguous_format)
        hides = None if hidden is None else hidden.expand(scores.shape)
        for place in _blocks(scores):
            values = scores[place] * scale if scores.dtype == torch.float32 else scores[place].float().mul_(scale)
            if hides is not None:
                values.masked_fill_(hides[place], float("-inf"))
            torch.softmax(values, dim=-1, out=values)
            if hides is not None and not all_see:
                values.masked_fill_(hides[place], 0.0)  # a query that sees nothing has no numbers
            output[place] = values
        ctx.save_for_backward(output)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        gradient = torch.empty_like(output)
        for place in _blocks(output):
            shares = output[place].float()
            part = torch._softmax_backward_data(upstream[place].float(), shares, -1, torch.float32)
            gradient[place] = part.mul_(ctx.scale)
        return gradient, None, None, None


def _blocks(scores: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield places of heads of one row of the batch, as many as a block holds, at least one."""
    heads = max(1, BLOCK_SIZE // max(1, scores.shape[2] * scores.shape[3]))
    for row in range(scores.shape[0]):
        for first in range(0, scores.shape[1], heads):
            yield row, slice(first, first + heads)
