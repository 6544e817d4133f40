"""Attention of queries over a part of their keys, and how the parts become the whole.

For the parts P of the keys, with scores s_ij = scale q_i k_j + bias_ij,

    l_i^P = log sum_{j in P} exp s_ij        o_i^P = sum_{j in P} exp(s_ij - l_i^P) v_j
    l_i   = log sum_P exp l_i^P              o_i   = sum_P exp(l_i^P - l_i) o_i^P

and the gradients of a part need nothing of the others but l_i and o_i (Dao et al. 2022, Liu et al. 2023):

    p_ij = exp(s_ij - l_i)     ds_ij = p_ij (do_i v_j - do_i o_i)
    dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i     dv_j = sum_i p_ij do_i

Scores, log-sum-exps, merged outputs and sums of gradients are fp32. On a GPU in 16 bits PyTorch's flash kernel computes
the parts that have no bias, unless another kernel is given, which may know windows and documents too; other parts are
computed by the formula, a tile of queries at a time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.ops.sight import Bounds

_TILE = 512
_LEAST = torch.finfo(torch.float32).min


class Gradients(NamedTuple):
    """Gradients of query [b, n, q, d], key and value [b, k, s, d]."""

    query: Tensor
    key: Tensor
    value: Tensor


class PartKernel(Protocol):
    """A kernel that computes parts; arguments are those of `attend_part` and `attend_part_backward`.

    bounds: instead of causal, which keys each query sees; or None.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bounds: Bounds | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output and its log-sum-exp."""
        ...

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float,
        causal: bool, bounds: Bounds | None,
    ) -> Gradients:  # fmt: skip
        """Return what the part adds to the gradients."""
        ...


class PartKernels(NamedTuple):
    """What computes parts that see all keys or the causal ones, and parts with other limits; None: what is here."""

    plain: PartKernel | None = None
    limited: PartKernel | None = None


NO_KERNELS = PartKernels()


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output [b, n, q, d] of one part, and its log-sum-exp [b, n, q] in fp32.

    query: [b, n, q, d]. key, value: [b, k, s, d], each serving n/k consecutive query heads.
    causal: query i sees keys 0..i; needs q == s and no bias.
    bias: fp32, added to the scores, broadcasting to [b, n, q, s]; -inf hides. A query that sees nothing has output 0
        and log-sum-exp -inf.
    """
    if _has_kernel(query, bias):
        return _attend_flash(query, key, value, scale, causal)
    parts = [_attend_tile(tile, each, key, value, scale) for tile, each in _tiles(query, key, causal, bias)]
    return torch.cat([output for output, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def attend_part_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Gradients:
    """Return what one part adds to the gradients.

    gradient, output: [b, n, q, d] of the whole, in the query's dtype; lse: [b, n, q] of the whole, fp32. The rest is
    as it was given to `attend_part`.
    """
    if _has_kernel(query, bias):
        return _flash_backward(gradient, query, key, value, output, lse, scale, causal)
    delta = (gradient.float() * output.float()).sum(dim=-1)
    of_query = []
    of_key, of_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
    tiles = _tiles(query, key, causal, bias)
    pieces = zip(tiles, *(each.split(_TILE, dim=2) for each in (gradient, lse, delta)), strict=True)
    for (tile, tile_bias), tile_gradient, tile_lse, tile_delta in pieces:
        found = _tile_backward(tile, tile_bias, key, value, tile_gradient, tile_lse, tile_delta, scale)
        of_query.append(found.query)
        of_key += found.key
        of_value += found.value
    return Gradients(torch.cat(of_query, dim=2), of_key, of_value)


def merge_part(output: Tensor, lse: Tensor, part_output: Tensor, part_lse: Tensor) -> None:
    """Add a part to what has been merged so far, in place: output [b, n, q, d] and lse [b, n, q], both fp32.

    Start with output 0 and lse -inf."""
    total = torch.logaddexp(lse, part_lse).clamp(min=_LEAST)  # two empty parts make an empty one, and not NaN
    output.mul_((lse - total).exp().unsqueeze(-1))
    output.add_(part_output * (part_lse - total).exp().unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _has_kernel(query: Tensor, bias: Tensor | None) -> bool:
    size = query.shape[-1]
    is_fit = query.dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256
    return query.device.type in ("cuda", "meta") and is_fit and bias is None


# The plain path: a tile of queries at a time, everything in fp32.


def _tiles(query: Tensor, key: Tensor, causal: bool, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Return each tile of queries [b, n, t, d] with its bias, or None."""
    tiles: list[tuple[Tensor, Tensor | None]] = []
    columns = torch.arange(key.shape[2], device=query.device)
    for start in range(0, query.shape[2], _TILE):
        stop = min(start + _TILE, query.shape[2])
        if causal:
            hidden = columns > columns[start:stop].unsqueeze(1)
            tile_bias = torch.zeros(hidden.shape, device=query.device).masked_fill_(hidden, float("-inf"))
        elif bias is not None:
            tile_bias = bias[..., start:stop, :]
        tiles.append((query[:, :, start:stop], tile_bias if causal or bias is not None else None))
    return tiles


def _attend_tile(query: Tensor, bias: Tensor | None, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(query, bias, key, scale)
    most = scores.amax(dim=-1, keepdim=True).clamp(min=_LEAST)
    weights = (scores - most).exp()
    total = weights.sum(dim=-1, keepdim=True)
    output = torch.einsum("bkgqs,bksd->bkgqd", weights, value.float()) / total.clamp(min=1e-30)
    return output.flatten(1, 2), (total.log() + most).squeeze(-1).flatten(1, 2)


def _tile_backward(
    query: Tensor,
    bias: Tensor | None,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> Gradients:
    groups = (key.shape[1], -1)
    grouped = gradient.float().unflatten(1, groups)
    probabilities = (_scores(query, bias, key, scale) - lse.unflatten(1, groups).unsqueeze(-1)).exp()
    of_value = torch.einsum("bkgqs,bkgqd->bksd", probabilities, grouped)
    of_scores = torch.einsum("bkgqd,bksd->bkgqs", grouped, value.float()) - delta.unflatten(1, groups).unsqueeze(-1)
    of_scores = of_scores * probabilities * scale
    of_query = torch.einsum("bkgqs,bksd->bkgqd", of_scores, key.float())
    of_key = torch.einsum("bkgqs,bkgqd->bksd", of_scores, query.float().unflatten(1, groups))
    return Gradients(of_query.flatten(1, 2), of_key, of_value)


def _scores(query: Tensor, bias: Tensor | None, key: Tensor, scale: float) -> Tensor:
    """Return [b, k, n/k, q, s] fp32."""
    groups = (key.shape[1], -1)
    scores = torch.einsum("bkgqd,bksd->bkgqs", query.float().unflatten(1, groups), key.float()) * scale
    if bias is None:
        return scores
    if bias.dim() >= 3:
        bias = bias.unflatten(-3, groups) if bias.shape[-3] > 1 else bias.unsqueeze(-3)
    return scores + bias


# PyTorch's flash kernel, which knows key-value groups and causality, but no bias.


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return output, lse[..., : query.shape[2]]


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> Gradients:
    none = torch.empty(0, dtype=torch.uint64, device=query.device)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
        none, none, scale=scale,
    )  # fmt: skip
    return Gradients(*found[:3])
