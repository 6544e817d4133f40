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


@dataclass(frozen=True)
class Block:
    """Queries of `num_queries`, which are the last of `num_keys` tokens, and the keys that any of them sees."""

    queries: slice
    keys: slice
    sight: Sight
    num_queries: int
    num_keys: int

    def added(self) -> Tensor:
        """Return what is added to the scores [b, n, q, s] of its last keys, as many as it has; -inf hides."""
        offset, size = self.num_keys - self.num_queries, self.queries.stop - self.queries.start
        sight = self.sight
        if not sight.rowwise and not sight.is_windowed(self.num_keys) and sight.slopes is None:
            return torch.full((size, size), float("-inf")).triu(1)  # keys before the block are seen by all of it
        rows = torch.arange(self.queries.start + offset, self.queries.stop + offset)
        columns = torch.arange(self.keys.start, self.keys.stop)
        return sight.distance_bias(rows, columns).masked_fill(~sight.seen(rows, columns), float("-inf"))


class Between:
    """What stands between the products of a block, in place, by PyTorch's functions."""

    def probabilities_(self, scores: Tensor, block: Block) -> None:
        """Turn scores [b, n, q, s] of a block's queries and keys into their softmax over what is seen."""
        added = block.added()
        scores[..., scores.shape[3] - added.shape[-1] :] += added
        torch.softmax(scores, dim=-1, out=scores)

    def gradient(self, gradient: Tensor, probabilities: Tensor, block: Block) -> Tensor:
        """Return dS of dP and P [b, n, q, s], in the place of dP or not."""
        return torch._softmax_backward_data(gradient, probabilities, -1, gradient.dtype)

    def add_(self, total: Tensor, part: Tensor) -> None:
        """Add part [b, s, d] to a slice [b, s, d] of fp32 sums."""
        total += part


EAGER = Between()


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight, between: Between = EAGER) -> Tensor:
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
        between,
    )
    return output.flatten(1, 2)


def blocks_of(sight: Sight, num_queries: int, num_keys: int) -> Iterator[Block]:
    """Yield the blocks of queries, in order."""
    offset = num_keys - num_queries
    bounds = sight.bounds(num_queries, num_keys, torch.device("cpu")) if sight.rowwise else None
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        if bounds is not None:
            first = int(bounds.first[:, start].min())
        else:
            first = 0 if sight.window is None else max(0, start + offset - sight.window)
        yield Block(slice(start, stop), slice(first, stop + offset), sight, num_queries, num_keys)


class _Blocked(torch.autograd.Function):
    """query [b, k, r, q, d]: the r heads of each of k groups; key, value [b k, s, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight, between: Between) -> Tensor:
        batch, groups, heads, length, dim = query.shape
        output = query.new_empty(batch, length, groups, heads, dim).permute(0, 2, 3, 1, 4)
        kept: list[Tensor] = []
        for block in blocks_of(sight, length, key.shape[1]):
            probabilities = _probabilities(query, key, block, between)
            part = torch.bmm(probabilities, value[:, block.keys])
            output[:, :, :, block.queries] = part.view(output[:, :, :, block.queries].shape)
            if key.shape[1] <= LONGEST_KEPT:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.sight, ctx.between = sight, between
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        between, scale = ctx.between, ctx.sight.scale
        query_gradient = torch.empty_like(query, memory_format=torch.contiguous_format)
        # Sums over blocks are fp32, whatever the dtype of the products, and begin with the last, which sees the most.
        key_gradient, value_gradient = (torch.empty_like(each, dtype=torch.float32) for each in (key, value))
        blocks = list(enumerate(blocks_of(ctx.sight, query.shape[3], key.shape[1])))
        for index, block in reversed(blocks):
            rows, gradient = _rows(query, block.queries), _rows(upstream[0], block.queries)
            probabilities = kept[index] if kept else _probabilities(query, key, block, between)
            values = torch.bmm(probabilities.transpose(1, 2), gradient)
            scores = torch.bmm(gradient, value[:, block.keys].transpose(1, 2))
            apart = (_by_head(each, query) for each in (scores, probabilities))
            scores = between.gradient(*apart, block).view(scores.shape)
            part = _scaled_product(scores, key[:, block.keys], scale)
            query_gradient[:, :, :, block.queries] = part.view(query_gradient[:, :, :, block.queries].shape)
            keys = _scaled_product(scores.transpose(1, 2), rows, scale)
            for total, part in ((key_gradient, keys), (value_gradient, values)):
                if block is blocks[-1][1]:
                    total[:, : block.keys.start] = 0
                    total[:, block.keys] = part
                else:
                    between.add_(total[:, block.keys], part)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None


def _rows(heads: Tensor, block: slice) -> Tensor:
    """Return a block of [b, k, r, s, d] as [b k, r * block, d]."""
    return heads[:, :, :, block].flatten(2, 3).flatten(0, 1)


def _by_head(scores: Tensor, query: Tensor) -> Tensor:
    """Return scores [b k, r * block, s] as [b, n, block, s], of query [b, k, r, q, d]."""
    batch, groups, heads = query.shape[:3]
    return scores.view(batch, groups * heads, -1, scores.shape[2])


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right of batches of matrices."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _probabilities(query: Tensor, key: Tensor, block: Block, between: Between) -> Tensor:
    """Return the softmax of a block's scores over its keys, [b k, r * block, keys]."""
    scores = _scaled_product(_rows(query, block.queries), key[:, block.keys].transpose(1, 2), block.sight.scale)
    between.probabilities_(_by_head(scores, query), block)
    return scores
