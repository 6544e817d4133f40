"""From the joint projection to the heads of attention: query, key and value apart, queries and keys turned.

    groups [b, s, k, n/k + 2, d]  ->  query [b, n, s, d], key [b, k, s, d], value [b, k, s, d]

Rows of a group are its n/k query heads, its key and its value. On a CPU the heads are copied once into the layout that
attention multiplies in, and turned there: a rotation touches few features of each head, and PyTorch's loop over
them is fast only where the positions of one head follow each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.rotary import rotate

Heads = tuple[Tensor, Tensor, Tensor]


def split_heads(groups: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """Return query, key and value of `groups`, with the rotary embedding of tables [s, 1, 1, r/2] or [b, s, 1, 1, r/2].

    The tables get no gradient.
    """
    if groups.device.type != "cpu" or torch.compiler.is_compiling():
        return split_heads_reference(groups, cos, sin)
    heads: Heads = _SplitHeads.apply(groups, _beside_heads(cos), _beside_heads(sin))
    return heads


def split_heads_reference(groups: Tensor, cos: Tensor | None, sin: Tensor | None) -> Heads:
    """The same by slicing; without tables nothing is turned."""
    turning, value = groups.split([groups.shape[3] - 1, 1], dim=3)
    if cos is not None and sin is not None:
        turning = rotate(turning, cos, sin)  # queries and key of a group in one go
    query, key = turning.split([turning.shape[3] - 1, 1], dim=3)
    query, key, value = (heads.flatten(2, 3).transpose(1, 2) for heads in (query, key, value))
    return query, key, value


class _SplitHeads(torch.autograd.Function):
    """cos, sin: [s, r/2] or [b, 1, 1, s, r/2]."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        ctx.save_for_backward(cos, sin)
        heads = [part.contiguous() for part in _by_head(groups)]
        for turning in heads[:2]:
            first, second = _halves(turning, cos)
            turned = _turn(first, second, cos, sin)
            first.copy_(turned[0])
            second.copy_(turned[1])
        query, key, value = (part.flatten(1, 2) for part in heads)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        query, key, value = upstream
        batch, num_groups, length, dim = key.shape
        groups = key.new_empty(batch, length, num_groups, query.shape[1] // num_groups + 2, dim)
        targets = _by_head(groups)
        for target, part in zip(targets, (query, key, value), strict=True):
            target.copy_(part.reshape(target.shape))
        for target, part in zip(targets[:2], (query, key), strict=True):
            turned = _turn(*_halves(part.reshape(target.shape), cos), cos, -sin)
            for half, values in zip(_halves(target, cos), turned, strict=True):
                half.copy_(values)
        return groups, None, None


def _by_head(groups: Tensor) -> list[Tensor]:
    """Return views of the queries [b, k, n/k, s, d], keys and values [b, k, 1, s, d]."""
    parts = groups.permute(0, 2, 3, 1, 4).split([groups.shape[3] - 2, 1, 1], dim=2)
    return list(parts)


def _halves(heads: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the two features of each pair, [..., r/2] each."""
    half = cos.shape[-1]
    return heads[..., :half], heads[..., half : 2 * half]


def _turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs turned, in fp32: (first cos - second sin, second cos + first sin)."""
    first, second = first.float(), second.float()
    return torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)


def _beside_heads(table: Tensor) -> Tensor:
    """Return a table [s, 1, 1, r/2] or [b, s, 1, 1, r/2] as [s, r/2] or [b, 1, 1, s, r/2]."""
    table = table.flatten(-3)
    return table if table.dim() == 2 else table[:, None, None]
