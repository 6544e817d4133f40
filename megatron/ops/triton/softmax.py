"""Softmax of scaled and masked attention scores, fp32 inside: one program computes one row of keys.

    p = softmax(scale * x, where seen);   dx = scale * p * (dp - sum(p * dp))

A row that fits in one block is read once; a longer one is read twice, the second time from the cache. Blocks
outside of what causality and the window allow are not read; their probabilities are written as zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.triton.launch import Sample, operator, runs, start

LARGEST_BLOCK = 8192
"""Keys that a program holds in registers at once: 16 of each thread's with 16 warps."""


LOWEST = tl.constexpr(-1.0e30)
SMALLEST = tl.constexpr(1.0e-30)


@triton.jit
def _range(query, num_queries, num_keys, window, CAUSAL: tl.constexpr):
    """Return the first key that a query sees and the one after the last; queries are the last of the keys."""
    first, stop = 0, num_keys
    if CAUSAL:
        stop = tl.maximum(num_keys - num_queries + query + 1, 0).to(tl.int32)
        first = tl.maximum(stop - window, 0)
    return first, stop


@triton.jit
def _load(row, columns, first, stop, num_keys):
    """Return a block of a row in fp32, and which of its keys are in [first, stop).

    Others may be read, so that the mask is constant over 16 keys and loads stay wide.
    """
    is_near = (columns >= first // 16 * 16) & (columns < tl.minimum((stop + 15) // 16 * 16, num_keys))
    values = tl.load(row + columns, mask=is_near, other=0.0).to(tl.float32)
    return values, (columns >= first) & (columns < stop)


@triton.jit
def _load_scores(row, mask_row, columns, first, stop, num_keys, scale, HAS_MASK: tl.constexpr):
    """Return a block of scaled scores in fp32, with -inf for keys that are not seen."""
    values, seen = _load(row, columns, first, stop, num_keys)
    if HAS_MASK:
        seen = seen & (tl.load(mask_row + columns, mask=columns < num_keys, other=0) != 0)
    return tl.where(seen, values * scale, float("-inf"))


@triton.jit
def _forward(
    scores, probabilities, mask, scale, num_heads, num_queries, num_keys, window,
    score_stride_b, score_stride_n, score_stride_q, mask_stride_b, mask_stride_n, mask_stride_q,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    query, head = index % num_queries, index // num_queries % num_heads
    batch = index // num_queries // num_heads
    row = scores + batch * score_stride_b + head * score_stride_n + query * score_stride_q
    mask_row = mask + batch * mask_stride_b + head * mask_stride_n + query * mask_stride_q
    output = probabilities + index * num_keys
    first, stop = _range(query, num_queries, num_keys, window, CAUSAL)
    columns = tl.arange(0, BLOCK)
    # A row that sees nothing has the maximum LOWEST, all weights 0 and the sum SMALLEST.
    if ONE_BLOCK:
        values = _load_scores(row, mask_row, columns, first, stop, num_keys, scale, HAS_MASK)
        weights = tl.exp(values - tl.maximum(tl.max(values, axis=0), LOWEST))
        weights = weights * (1.0 / tl.maximum(tl.sum(weights, axis=0), SMALLEST))
        tl.store(output + columns, weights.to(output.dtype.element_ty), mask=columns < num_keys)
    else:
        maximum, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
        for begin in range(first // BLOCK * BLOCK, stop, BLOCK):
            values = _load_scores(row, mask_row, begin + columns, first, stop, num_keys, scale, HAS_MASK)
            larger = tl.maximum(maximum, tl.max(values, axis=0))
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(values - larger), axis=0)
            maximum = larger
        inverse = 1.0 / tl.maximum(total, SMALLEST)
        for begin in range(0, num_keys, BLOCK):
            values = _load_scores(row, mask_row, begin + columns, first, stop, num_keys, scale, HAS_MASK)
            weights = tl.exp(values - maximum) * inverse
            tl.store(output + begin + columns, weights.to(output.dtype.element_ty), mask=begin + columns < num_keys)


@triton.jit
def _backward(
    probabilities, upstream, gradient, scale, num_queries, num_keys, window,
    CAUSAL: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    first, stop = _range(index % num_queries, num_queries, num_keys, window, CAUSAL)
    probabilities += index * num_keys
    upstream += index * num_keys
    gradient += index * num_keys
    columns = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        weights, seen = _load(probabilities, columns, first, stop, num_keys)
        above = tl.where(seen, _load(upstream, columns, first, stop, num_keys)[0], 0.0)
        result = scale * weights * (above - tl.sum(weights * above, axis=0))
        tl.store(gradient + columns, result.to(gradient.dtype.element_ty), mask=columns < num_keys)
    else:
        dot = tl.full((), 0.0, tl.float32)
        for begin in range(first // BLOCK * BLOCK, stop, BLOCK):
            weights, seen = _load(probabilities, begin + columns, first, stop, num_keys)
            above = tl.where(seen, _load(upstream, begin + columns, first, stop, num_keys)[0], 0.0)
            dot += tl.sum(weights * above, axis=0)
        for begin in range(0, num_keys, BLOCK):
            weights, seen = _load(probabilities, begin + columns, first, stop, num_keys)
            above = tl.where(seen, _load(upstream, begin + columns, first, stop, num_keys)[0], 0.0)
            result = (scale * weights * (above - dot)).to(gradient.dtype.element_ty)
            tl.store(gradient + begin + columns, result, mask=begin + columns < num_keys)


@operator()
def masked_softmax_forward(scores: Tensor, mask: Tensor | None, scale: float, causal: bool, window: int) -> Tensor:
    """Return softmax(scale * scores) over the keys seen, [b, n, q, k] contiguous, in the scores' dtype.

    mask: bool, broadcasts to [b, n, q, k]; True is seen. window: the keys up to its own that a causal query sees.
    """
    batch, heads, queries, keys = scores.shape
    output = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if runs(scores):
        scores = scores if scores.stride(3) == 1 else scores.contiguous()
        seen = scores if mask is None else _spread(mask, scores)
        start(
            _forward,
            (batch * heads * queries,),
            scores,
            output,
            seen,
            scale,
            heads,
            queries,
            keys,
            window,
            *scores.stride()[:3],
            *seen.stride()[:3],
            CAUSAL=causal,
            HAS_MASK=mask is not None,
            **_constants(keys),
        )
    return output


@operator()
def masked_softmax_backward(probabilities: Tensor, upstream: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    """Return the gradient of the scores, [b, n, q, k] contiguous."""
    queries, keys = probabilities.shape[2:]
    gradient = torch.empty(probabilities.shape, dtype=probabilities.dtype, device=probabilities.device)
    if runs(gradient):
        start(
            _backward,
            (gradient.numel() // keys,),
            probabilities.contiguous(),
            upstream.contiguous(),
            gradient,
            scale,
            queries,
            keys,
            window,
            CAUSAL=causal,
            **_constants(keys),
        )
    return gradient


def _spread(mask: Tensor, scores: Tensor) -> Tensor:
    """Return the mask as bytes [b, n, q, k] whose last stride is 1; the others may be 0."""
    if mask.shape[-1] != scores.shape[3]:
        mask = mask.expand(*mask.shape[:-1], scores.shape[3])
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask.view(torch.uint8).expand(scores.shape)


def _constants(num_keys: int) -> dict[str, int]:
    block = min(LARGEST_BLOCK, triton.next_power_of_2(num_keys))
    return {"ONE_BLOCK": num_keys <= block, "BLOCK": block, "num_warps": min(16, max(1, block // 256))}


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, scale: float, causal: bool, window: int) -> Tensor:
        probabilities: Tensor = masked_softmax_forward(scores, mask, scale, causal, window)
        ctx.save_for_backward(probabilities)
        ctx.settings = (scale, causal, window)
        return probabilities

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = masked_softmax_backward(ctx.saved_tensors[0], upstream[0], *ctx.settings)
        return gradient, None, None, None, None


def masked_softmax(
    scores: Tensor, scale: float, causal: bool = False, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """`megatron.ops.softmax.masked_softmax`."""
    assert causal or window is None, "a window is one of causal attention"
    probabilities: Tensor = _MaskedSoftmax.apply(scores, mask, scale, causal, window or scores.shape[3])
    return probabilities


def samples() -> list[Sample]:
    """Causal and padded rows of 2048 keys, a window, and a row longer than a block."""
    return [
        Sample("masked_softmax causal", partial(_sample, 2048, True, None, False)),
        Sample("masked_softmax padding", partial(_sample, 2048, False, None, True)),
        Sample("masked_softmax window", partial(_sample, 32768, True, 256, True)),
    ]


def _sample(keys: int, causal: bool, window: int | None, padding: bool, device: torch.device) -> None:
    shape = (4, 16, keys, keys)
    scores = torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
    mask = torch.empty((4, 1, 1, keys), dtype=torch.bool, device=device) if padding else None
    output = masked_softmax(scores, 0.125, causal, window, mask)
    output.backward(torch.empty_like(output))
