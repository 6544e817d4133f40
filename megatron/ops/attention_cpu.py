"""Causal attention on a CPU, as batched matrix products over blocks of queries.

For queries i of a block and the keys j <= i that a window, documents and padding leave to any of them:

    P = softmax(scale * q k^T)        o = P v
    dv = P^T do      dP = do v^T      dS = P (dP - sum_j dP P)      dq = scale * dS k      dk = scale * dS^T q

Of long sequences only P of one block is held at a time, and the backward pass computes it again. PyTorch's own CPU
kernel does the same sums with products too small for the matrix units: 4 x 8 heads of 64 features at 512 positions,
forward and backward on one EPYC (Zen 4) core, take 102 ms there and 58 ms here in bf16, 100 ms and 85 ms in fp32, with
P computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.ops.sight import Sight

BLOCK = 128
"""Queries of a block; smaller blocks waste less of the triangle, larger ones make better products."""

LONGEST_KEPT = 512
"""Tokens of the longest sequence whose P is kept for the backward pass: with heads of 64 features that is at most a
third more memory than a block keeps anyway, and saves a seventh of attention's products and its softmax."""


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """Return [b, n, q, d] from query [b, n, q, d], key and value [b, k, s, d]; queries are the last of the keys.

    sight: causal, without a learned bias. Scores are held in the input's dtype; the softmax itself is fp32. In memory
    the result is [b, q, n, d], as the next product wants it.
    """
    groups, (batch, heads, length, dim), keys = key.shape[1], query.shape, key.shape[2]
    assert length <= keys, "a query sees itself"
    output: Tensor = _Blocked.apply(
        query.reshape(batch, groups, heads // groups, length, dim),
        key.reshape(batch * groups, keys, dim),
        value.reshape(batch * groups, keys, dim),
        sight,
    )
    return output.flatten(1, 2)


@dataclass(frozen=True)
class _Block:
    """Queries, and the keys that any of them sees.

    added: to the scores [b, k, r, q, s] of its last keys, as many as `added` has; -inf where nothing is seen.
    """

    queries: slice
    keys: slice
    added: Tensor


def _blocks(sight: Sight, num_queries: int, num_keys: int) -> Iterator[_Block]:
    """Yield the blocks of queries, in order."""
    offset, positions = num_keys - num_queries, torch.arange(num_keys)
    plain = not sight.rowwise and not sight.is_windowed(num_keys) and sight.slopes is None
    bounds = sight.bounds(num_queries, num_keys, positions.device) if sight.rowwise else None
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        if bounds is not None:
            first = int(bounds.first[:, start].min())
        else:
            first = 0 if sight.window is None else max(0, start + offset - sight.window)
        keys = slice(first, stop + offset)
        if plain:  # keys before the block are seen by all of it
            size = stop - start
            yield _Block(slice(start, stop), keys, torch.full((size, size), float("-inf")).triu(1))
            continue
        rows, columns = positions[start + offset : stop + offset], positions[keys]
        added = sight.distance_bias(rows, columns).masked_fill(~sight.seen(rows, columns), float("-inf"))
        yield _Block(slice(start, stop), keys, added)


class _Blocked(torch.autograd.Function):
    """query [b, k, r, q, d]: the r heads of each of k groups; key, value [b k, s, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        batch, groups, heads, length, dim = query.shape
        output = query.new_empty(batch, length, groups, heads, dim).permute(0, 2, 3, 1, 4)
        kept: list[Tensor] = []
        for block in _blocks(sight, length, key.shape[1]):
            probabilities = _probabilities(query, key, block, sight.scale)
            part = torch.bmm(probabilities, value[:, block.keys])
            output[:, :, :, block.queries] = part.view(output[:, :, :, block.queries].shape)
            if key.shape[1] <= LONGEST_KEPT:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.sight = sight
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        scale = ctx.sight.scale
        query_gradient = torch.empty_like(query, memory_format=torch.contiguous_format)
        # Sums over blocks are fp32, whatever the dtype of the products.
        key_gradient = torch.zeros_like(key, dtype=torch.float32)
        value_gradient = torch.zeros_like(value, dtype=torch.float32)
        for index, block in enumerate(_blocks(ctx.sight, query.shape[3], key.shape[1])):
            rows, gradient = _rows(query, block.queries), _rows(upstream[0], block.queries)
            probabilities = kept[index] if kept else _probabilities(query, key, block, scale)
            value_gradient[:, block.keys] += torch.bmm(probabilities.transpose(1, 2), gradient)
            scores = torch.bmm(gradient, value[:, block.keys].transpose(1, 2))
            scores = torch._softmax_backward_data(scores, probabilities, -1, scores.dtype)
            part = _scaled_product(scores, key[:, block.keys], scale)
            query_gradient[:, :, :, block.queries] = part.view(query_gradient[:, :, :, block.queries].shape)
            key_gradient[:, block.keys] += _scaled_product(scores.transpose(1, 2), rows, scale)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None


def _rows(heads: Tensor, block: slice) -> Tensor:
    """Return a block of [b, k, r, s, d] as [b k, r * block, d]."""
    return heads[:, :, :, block].flatten(2, 3).flatten(0, 1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right of batches of matrices."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _probabilities(query: Tensor, key: Tensor, block: _Block, scale: float) -> Tensor:
    """Return the softmax of a block's scores over its keys, [b k, r * block, keys]."""
    scores = _scaled_product(_rows(query, block.queries), key[:, block.keys].transpose(1, 2), scale)
    batch, groups, heads = query.shape[:3]
    apart = scores.view(batch, groups, heads, -1, scores.shape[2])
    added = block.added
    if added.dim() == 4:  # [b, 1 or n, q, s]
        added = added.unsqueeze(1) if added.shape[1] == 1 else added.unflatten(1, (groups, heads))
    elif added.dim() == 3:
        added = added.unflatten(0, (groups, heads))
    apart[..., apart.shape[4] - added.shape[-1] :] += added
    return torch.softmax(scores, dim=-1, out=scores)
