"""Scaled dot-product attention of query groups over shared key-value heads.

    softmax(scale * q k^T + bias) v                                  Vaswani et al. 2017

Each of k key-value heads serves n/k consecutive query heads (Ainslie et al. 2023). The fast path is PyTorch's
SDPA, whose softmax is fp32 in every backend and which never holds an s x s matrix where it needs no bias; training on a
CPU has a path of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.attention_cpu import causal_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return [b, n, q, d] from query [b, n, q, d], key and value [b, k, s, d].

    causal: position i sees keys 0..i; needs q == s.
    mask: instead of causal, bool (True is seen) or an additive bias, broadcasting to [b, n, q, s].
    dropout: probability of dropping an attention weight.
    """
    if _trains_on_cpu(query) and causal and not dropout:
        return causal_attention(query, key, value, scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _trains_on_cpu(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled()


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """The formula, with every score in memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1).float(), value.repeat_interleave(groups, dim=1).float()
    scores = scale * query.float() @ key.transpose(-1, -2)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(dim=-1) @ value).to(query.dtype)
