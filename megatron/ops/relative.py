"""Attention biases that depend on the distance between query and key only.

alibi   -slope_h * (i - j)                                        Press et al. 2022
rpe     sqrt(d) * table[bucket(i - j), h]                         Raffel et al. 2020 (T5), causal buckets
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the n slopes, fp32.

    For n a power of two the slopes are 2^(-8 k / n), k = 1..n. Otherwise those of the next lower power of two m,
    followed by every second slope of 2 m, as in the paper's code.
    """
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * k / lower) for k in range(1, lower + 1)]
    between = [2 ** (-4 * k / lower) for k in range(1, 2 * lower + 1, 2)]
    return torch.tensor(slopes + between[: num_heads - lower])


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket [...] int64 of each distance i - j [...]; distances below 0 count as 0.

    The first half of the buckets holds one distance each; the others grow logarithmically up to `max_distance`, and
    the last one holds everything beyond.
    """
    distance = distance.clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))
