"""Causal self-attention of a decoder block.

Rows of query_key_value, group by group: the (n/k) query heads of key-value head g, then its key, then its value, each
d rows. Splitting the rows over the tensor axis therefore keeps groups whole, at any size that divides k.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from megatron.model.across import AcrossRanks, Asked
from megatron.model.cache import KVCache
from megatron.model.positions import ALONE, AttentionMask, RelativePositionBias, RotaryTables, Span
from megatron.model.recompute import recomputed
from megatron.ops.attention import attention
from megatron.ops.attention_backend import Attend
from megatron.ops.choice import Function
from megatron.ops.heads import split_heads, split_heads_reference
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import ColumnParallelLinear, Initializer, RowParallelLinear


class SelfAttention(nn.Module):
    """x [b, s, h] -> [b, s, h], between `TensorRegion.enter` and `leave`: what it returns is this rank's heads' part.

    layer: index of the block, its place in the KV cache.
    num_heads, num_kv_heads: n and k of the full model.
    key_scaling: divides the queries and multiplies the scores (apply_query_key_layer_scaling); 1 is off.
    qk_norm: one norm of this rank's query heads [n/tp, d] for queries and keys, or None.
    rotary: tables, or None. mask: what is seen and any alibi bias. rpe: relative position bias, or None.
    across: how tokens see those of the other ranks of the context axis; None where this rank has all of them.
    recompute: compute scores and what follows from them again in the backward pass.
    turn: a fused `ops.rotary.rotate_packed`, or None. attend: what computes attention where a rank has all tokens.
    """

    def __init__(
        self,
        layer: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        region: TensorRegion,
        init: Initializer,
        output_init: Initializer,
        bias: bool,
        dropout: float,
        mask: AttentionMask,
        rotary: RotaryTables | None = None,
        rpe: RelativePositionBias | None = None,
        qk_norm: nn.Module | None = None,
        key_scaling: float = 1.0,
        across: AcrossRanks | None = None,
        recompute: bool = False,
        turn: Function | None = None,
        attend: Attend = attention,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.recompute = recompute
        self.turn = turn
        self.attend = attend
        self.head_dim = hidden_size // num_heads
        self.group_size = num_heads // num_kv_heads
        self.num_groups = num_kv_heads // region.axis.size
        self.region = region
        self.dropout = dropout
        self.key_scaling = key_scaling
        self.mask = mask
        self.rotary = rotary
        rows = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.query_key_value = ColumnParallelLinear(hidden_size, rows, region, init, bias)
        self.dense = RowParallelLinear(hidden_size, hidden_size, region, output_init, bias)
        self.qk_norm = qk_norm
        self.rpe = rpe
        self.across = across

    def forward(self, hidden: Tensor, segments: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        span = Span.of(hidden.shape[1], cache, ALONE if self.across is None else self.across.axis)
        query, key, value = self._project(hidden, span)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        if self.key_scaling != 1.0:
            query = query / self.key_scaling
        if self.recompute:
            context = recomputed(self._attend, query, key, value, segments, span)
        else:
            context = self._attend(query, key, value, segments, span)
        return self.dense(context.transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, span: Span) -> Tensor:
        """Return what each query sees of the values, [b, n, s, d]."""
        scale = self.key_scaling / math.sqrt(self.head_dim)
        dropout = self.dropout if self.training else 0.0
        with self.region.own_stream(query.device) if dropout else nullcontext():
            if self.across is not None:
                return self.across(Asked(query, key, value, scale, self.mask, segments, self.rpe, dropout))
            sight = self.mask(scale, span, segments, self.rpe, query.device)
            return self.attend(query, key, value, sight, dropout)

    def _project(self, hidden: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [b, n, s, d], key and value [b, k, s, d], normed and turned."""
        rows, length = hidden.shape[:2]
        groups = self.query_key_value(hidden).view(rows, length, self.num_groups, self.group_size + 2, self.head_dim)
        if self.qk_norm is not None:
            groups = self._normed(groups)
        if self.rotary is None:
            return split_heads_reference(groups, None, None)
        tables = self.rotary(span, hidden.device)
        if self.turn is None:
            return split_heads(groups, *tables)
        query, key, value = self.turn(groups, *tables)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _normed(self, groups: Tensor) -> Tensor:
        """Return groups [b, s, k, n/k + 2, d] as [b, s, n, 3, d], with queries and keys normed.

        The gains [n, d] differ per query head, so each query head gets its own key, as in GPT-NeoX.
        """
        assert self.qk_norm is not None
        query, key, value = groups.split([self.group_size, 1, 1], dim=3)
        key, value = (heads.flatten(2, 3).repeat_interleave(self.group_size, dim=2) for heads in (key, value))
        return torch.stack([self.qk_norm(query.flatten(2, 3)), self.qk_norm(key), value], dim=3)
