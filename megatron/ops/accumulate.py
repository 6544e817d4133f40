"""Sums of gradients in a wider dtype than the gradients' own: `total += part`."""

from __future__ import annotations

from torch import Tensor

_BLOCK = 2**18
"""Elements that are converted at once, which stay in a CPU's cache."""


def accumulate(total: Tensor, part: Tensor, is_first: bool) -> None:
    """Set `total` to `part`, or add it: of one shape, of any dtypes, without a copy of `part` in that of `total`."""
    if is_first:
        total.copy_(part)
    elif total.dtype == part.dtype or total.device.type != "cpu":
        total.add_(part)
    else:  # PyTorch would convert all of it first
        for block, added in zip(total.view(-1).split(_BLOCK), part.reshape(-1).split(_BLOCK), strict=True):
            block.add_(added)
