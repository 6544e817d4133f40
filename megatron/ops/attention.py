"""Scaled dot-product attention of query groups over shared key-value heads, and what computes it.

    softmax(scale * q k^T + bias) v                                  Vaswani et al. 2017

Each of k key-value heads serves n/k consecutive query heads (Ainslie et al. 2023). What tokens see is told by a
`Sight`, and each back end makes of it what it needs: PyTorch's SDPA a flag, or a mask where the flag does not say it
all; our kernel and flash-attn numbers for each token. The formula that all of them are compared with is
`sight_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.attention_backend import Attend, Backend
from megatron.ops.attention_sdpa import SDPA
from megatron.ops.sight import Sight

attention: Backend = SDPA
"""PyTorch's, which computes everything everywhere."""


def first_of(*backends: Attend) -> Attend:
    """Return attention by the first back end that can do what is asked for in a call, at last by PyTorch's SDPA.

    A back end is chosen for training; the same layer decodes, evaluates and drops nothing. The last one was chosen for
    rows of several documents, and comes first there.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
        for backend in backends if sight.segments is None else reversed(backends):
            if not isinstance(backend, Backend) or not backend.lacks(query, key, sight, dropout):
                return backend(query, key, value, sight, dropout)
        return SDPA(query, key, value, sight, dropout)

    return attend


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """The formula, with every score in memory.

    causal: position i sees keys 0..i; needs q == s. mask: besides, bool (True is seen) or an additive bias,
    broadcasting to [b, n, q, s].
    """
    groups = query.shape[1] // key.shape[1]
    precision = torch.promote_types(query.dtype, torch.float32)
    key, value = (each.repeat_interleave(groups, dim=1).to(precision) for each in (key, value))
    scores = scale * query.to(precision) @ key.transpose(-1, -2)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1) @ value).to(query.dtype)


def sight_reference(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
    """The formula of what a Sight says, with the weights' dropout."""
    positions = torch.arange(key.shape[2], device=query.device)
    queries = positions[key.shape[2] - query.shape[2] :]
    precision = torch.promote_types(query.dtype, torch.float32)
    added = sight.distance_bias(queries, positions).to(precision)
    if sight.bias is not None:
        added = added + sight.bias
    added = added.masked_fill(~sight.seen(queries, positions), float("-inf"))
    if not dropout:
        return attention_reference(query, key, value, sight.scale, False, added)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1).to(precision) for each in (key, value))
    weights = (sight.scale * query.to(precision) @ key.transpose(-1, -2) + added).softmax(dim=-1)
    return (torch.dropout(weights, dropout, True) @ value).to(query.dtype)
