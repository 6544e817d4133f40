"""Rotary position embedding (Su et al. 2021), on halves as GPT-NeoX and LLaMA have it.

For rotary dim r and position p, feature pair (j, j + r/2) is turned by the angle p * base^(-2 j / r):

    y[j]       = x[j] cos - x[j + r/2] sin
    y[j + r/2] = x[j + r/2] cos + x[j] sin

Features beyond r pass unchanged. Angles, tables and the rotation are fp32; the result has the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [..., r/2] fp32, of integer `positions` [...] for rotary dim r = `dim`."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions.float().unsqueeze(-1) * base**-exponents
    return angles.cos(), angles.sin()


def rotate(inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the input [..., d] with its first r features turned.

    cos, sin: [..., r/2], broadcasting against the input's leading dims.
    """
    half = cos.shape[-1]
    first, second, rest = inputs.split([half, half, inputs.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(inputs.dtype) for part in (*turned, rest)], dim=-1)


def rotate_packed(packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn queries and keys of packed [b, s, k, g + 2, d]: of each key-value head its g queries, its key, its value.

    cos, sin: [s, 1, 1, r/2] or [b, s, 1, 1, r/2]. Returns queries [b, s, k g, d], keys and values [b, s, k, d]. Who
    computes it may do so in the memory of `packed`, which therefore nobody reads afterwards.
    """
    group = packed.shape[3] - 2
    turned = rotate(packed[:, :, :, : group + 1], cos, sin)
    return turned[:, :, :, :group].flatten(2, 3), turned[:, :, :, group], packed[:, :, :, group + 1]


def rotate_reference(inputs: Tensor, positions: Tensor, dim: int, base: float) -> Tensor:
    """The formula for inputs [s, d] at positions [s], one pair at a time."""
    output = inputs.clone()
    for pair in range(dim // 2):
        angle = positions.float() * base ** (-2 * pair / dim)
        first, second = inputs[:, pair].float(), inputs[:, pair + dim // 2].float()
        output[:, pair] = first * angle.cos() - second * angle.sin()
        output[:, pair + dim // 2] = second * angle.cos() + first * angle.sin()
    return output
