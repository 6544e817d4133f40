"""Attention that holds its scores: two batched products and a softmax between them.

It needs memory for every pair of tokens, and is here because it is what GPT-NeoX computes without flash attention, and
for devices that have nothing better. Its softmax is one of the operations that have kernels: `dense_with` takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.attention_backend import Backend
from megatron.ops.choice import Function
from megatron.ops.sight import Sight
from megatron.ops.softmax import masked_softmax


def dense_with(causal_softmax: Function, other_softmax: Function) -> Backend:
    """Return the back end; of `megatron.ops.softmax.masked_softmax`, one for plain causality and one for all else."""

    def compute(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float) -> Tensor:
        num_queries, num_keys = query.shape[2], key.shape[2]
        scaled, scale = (query * sight.scale, 1.0) if query.dtype == torch.float16 else (query, sight.scale)
        grouped = scaled.unflatten(1, (key.shape[1], -1))  # fp16 scores could overflow before they are scaled
        scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
        if sight.slopes is not None or sight.bias is not None:
            positions = torch.arange(num_keys, device=query.device)
            added = sight.distance_bias(positions[num_keys - num_queries :], positions)
            scores = scores.float() * scale + (added if sight.bias is None else added + sight.bias)
            scale = 1.0
        mask = sight.mask(num_queries, num_keys, query.device) if sight.rowwise else None
        window = sight.window + 1 if sight.window is not None and sight.is_windowed(num_keys) else None
        softmax = causal_softmax if sight.causal and mask is None and window is None else other_softmax
        weights = torch.dropout(softmax(scores, scale, sight.causal, window, mask), dropout, dropout > 0)
        context = weights.to(value.dtype).unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)
        return context.flatten(1, 2)

    return Backend("dense", compute, lambda query, key, sight, dropout: "")


DENSE = dense_with(masked_softmax, masked_softmax)
