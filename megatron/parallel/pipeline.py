"""Which layers each pipeline stage holds, and what the schedule costs; plain integers, without torch.

With S stages and M micro-batches a step takes M + S - 1 slots of one forward and one backward pass (1F1B, as GPipe), of
which each stage works in M:

    bubble = (S - 1) / (M + S - 1)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from megatron.errors import ConfigError, Problem


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Return the share of a step in which a stage has nothing to do."""
    return (stages - 1) / (micro_batches + stages - 1)


def balanced_bounds(weights: Sequence[int], stages: int) -> list[int]:
    """Return bounds [0, ..., len(weights)], stage s holding layers bounds[s] to bounds[s + 1], balanced by weight.

    The heaviest stage is as light as it can be, and among such splits the sum of squares is least. Every stage
    gets some weight. Raises ConfigError where fewer layers than stages have any.
    """
    if sum(weight > 0 for weight in weights) < stages:
        raise ConfigError(
            Problem(
                what=f"pipe_parallel_size = {stages}",
                why=f"only {sum(weight > 0 for weight in weights)} layers can begin a stage.",
                fix="Lower pipe_parallel_size, or set pipe_partition_method: parameters.",
            )
        )
    before = [0, *itertools.accumulate(weights)]
    limit = _smallest_maximum(weights, stages)
    # cost[end]: the least sum of squares of the first `end` layers in s stages; choice[s][end]: where the last begins.
    cost = [0.0] + [math.inf] * len(weights)
    choices: list[list[int]] = []
    for _ in range(stages):
        cost, begins = _one_more_stage(cost, before, limit)
        choices.append(begins)
    bounds = [len(weights)]
    for begins in reversed(choices):
        bounds.append(begins[bounds[-1]])
    return bounds[::-1]


def _one_more_stage(cost: Sequence[float], before: Sequence[int], limit: int) -> tuple[list[float], list[int]]:
    """Return the costs with one stage more, and where that stage begins for each end."""
    costs, begins = [math.inf] * len(cost), [0] * len(cost)
    for end in range(1, len(cost)):
        for begin in range(end - 1, -1, -1):
            weight = before[end] - before[begin]
            if weight > limit:
                break
            if weight > 0 and cost[begin] + weight**2 < costs[end]:
                costs[end], begins[end] = cost[begin] + weight**2, begin
    return costs, begins


def _smallest_maximum(weights: Sequence[int], stages: int) -> int:
    """Return the weight of the heaviest stage of the best split, by bisection."""
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(weights, middle) <= stages:
            high = middle
        else:
            low = middle + 1
    return low


def _stages_needed(weights: Sequence[int], limit: int) -> int:
    stages, held = 1, 0
    for weight in weights:
        stages, held = (stages + 1, weight) if held + weight > limit else (stages, held + weight)
    return stages
