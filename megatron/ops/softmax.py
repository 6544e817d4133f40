"""Softmax of attention scores that are scaled and masked, computed in fp32 whatever the scores' dtype.

    p[i, j] = exp(scale * x[i, j]) / sum over seen j' of exp(scale * x[i, j']), where query i sees key j; 0 elsewhere

It is for attention that needs its probabilities, as dropout or a bias between them and the values does; what needs only
the result has `megatron.ops.attention`. Queries are the last of the keys. A query that sees nothing has zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import softmax_cpu


def masked_softmax(
    scores: Tensor, scale: float, causal: bool = False, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the probabilities of scores [b, n, q, k], in their dtype.

    causal: query i sees keys 0..i + k - q; with `window`, the last so many of them only.
    mask: bool, True is seen, broadcasts to [b, n, q, k]; a padding mask is [b, 1, 1, k].
    """
    if not softmax_cpu.is_for(scores):
        return masked_softmax_reference(scores, scale, causal, window, mask)
    seen = _seen(scores, causal, window, mask)
    all_see = mask is None and scores.shape[2] <= scores.shape[3]
    return softmax_cpu.masked_softmax(scores, scale, None if seen is None else ~seen, all_see)


def masked_softmax_reference(
    scores: Tensor, scale: float, causal: bool = False, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """The formula, pass by pass."""
    values = scores.float() * scale
    seen = _seen(scores, causal, window, mask)
    if seen is None:
        return values.softmax(dim=-1).to(scores.dtype)
    probabilities = values.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return probabilities.masked_fill(~seen, 0.0).to(scores.dtype)


def _seen(scores: Tensor, causal: bool, window: int | None, mask: Tensor | None) -> Tensor | None:
    """Return what each query sees, bool; None: everything."""
    assert causal or window is None, "a window is one of causal attention"
    if not causal:
        return mask
    seen = seen_keys(scores.shape[2], scores.shape[3], window, scores.device)
    return seen if mask is None else seen & mask


def seen_keys(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return [q, k] bool: which keys causality and the window let each query see."""
    position = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    distance = position - torch.arange(num_keys, device=device)
    return (distance >= 0) & (distance < (window or num_keys))
