"""Cutting the model into pipeline stages so that the largest holds as few parameters as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Return the bounds [0, ..., len(weights)] of `parts` contiguous, non-empty parts whose largest sum is least.

    Raises ValueError where there are more parts than weights.
    """
    if parts > len(weights):
        raise ValueError(f"{len(weights)} layers cannot make {parts} stages")
    low, high = max(weights, default=0), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if _count(weights, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return _cut(weights, parts, low)


def _count(weights: Sequence[int], limit: int) -> int:
    """Return how many parts the greedy walk makes of at most `limit` each."""
    count, total = 1, 0
    for weight in weights:
        if total + weight > limit:
            count, total = count + 1, 0
        total += weight
    return count


def _cut(weights: Sequence[int], parts: int, limit: int) -> list[int]:
    """Return bounds within `limit`, each as near to an equal share of what is left as the limit allows."""
    sums = [0, *accumulate(weights)]
    bounds = [0]
    for part in range(parts - 1):
        start, left = bounds[-1], parts - part
        goal = sums[start] + (sums[-1] - sums[start]) / left
        ends = range(start + 1, len(weights) - left + 2)
        allowed = [end for end in ends if sums[end] - sums[start] <= limit and _count(weights[end:], limit) <= left - 1]
        bounds.append(min(allowed, key=lambda end: abs(sums[end] - goal)))
    return [*bounds, len(weights)]
