"""Which layers each pipeline stage holds, and what the schedule costs; plain integers, without torch.

With S stages and M micro-batches a step takes M + S - 1 slots of one forward and one backward pass (1F1B, as GPipe), of
which each stage works in M:

    bubble = (S - 1) / (M + S - 1)
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence

from megatron.errors import ConfigError, Problem


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Return the share of a step in which a stage has nothing to do."""
    return (stages - 1) / (micro_batches + stages - 1)


def layer_weights(method: str, kinds: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """Return the weight of each layer by `pipe_partition_method`.

    kinds: name and class of each layer; blocks are found by GPT-NeoX's word for them as well. sizes: their parameters.
    Raises ConfigError where `type:` finds no layer.
    """
    if method == "parameters":
        return list(sizes)
    if method == "uniform":
        return [1] * len(sizes)
    pattern = method.removeprefix("type:")
    found = [int(bool(re.search(pattern, kind, re.IGNORECASE))) for kind in kinds]
    if not any(found):
        why = f"no layer is called that; there are: {', '.join(dict.fromkeys(kinds))}."
        raise ConfigError(Problem(f"pipe_partition_method = {method}", why, "Set pipe_partition_method: parameters"))
    return found


def layer_kind(name: str, class_name: str, is_block: bool) -> str:
    """Return what the expression of `type:` is searched in."""
    return f"{name} {class_name}" + (" transformer" if is_block else "")


def balanced_bounds(weights: Sequence[int], stages: int, blocks: Sequence[bool]) -> list[int]:
    """Return bounds [0, ..., len(weights)], stage s holding layers bounds[s] to bounds[s + 1], balanced by weight.

    The heaviest stage is as light as it can be, and among such splits the sum of squares is least.
    blocks: which layers are blocks; every stage gets at least one, since without one it would idle most of the time.
    Raises ConfigError where there are fewer blocks than stages.
    """
    if sum(blocks) < stages:
        raise ConfigError(
            Problem(
                what=f"pipe_parallel_size = {stages}",
                why=f"each stage needs a layer, and num_layers = {sum(blocks)}.",
                fix=f"Set pipe_parallel_size to {max(1, sum(blocks))} or less.",
            )
        )
    before = [0, *itertools.accumulate(weights)]
    blocks_before = [0, *itertools.accumulate(blocks)]

    def weight(begin: int, end: int) -> float:
        return before[end] - before[begin] if blocks_before[begin] < blocks_before[end] else math.inf

    bounds = _cheapest(len(weights), stages, weight, max)
    limit = max(weight(begin, end) for begin, end in itertools.pairwise(bounds))

    def square(begin: int, end: int) -> float:
        return weight(begin, end) ** 2 if weight(begin, end) <= limit else math.inf

    return _cheapest(len(weights), stages, square, operator.add)


def _cheapest(
    count: int,
    stages: int,
    cost: Callable[[int, int], float],
    combine: Callable[[float, float], float],
) -> list[int]:
    """Return the bounds of the split of `count` layers into stages whose combined cost is least.

    cost(begin, end): of one stage. By dynamic programming over the number of stages and where the last one ends.
    """
    costs = [0.0] + [math.inf] * count
    begins: list[list[int]] = []
    for _ in range(stages):
        options = [
            min(((combine(costs[begin], cost(begin, end)), begin) for begin in range(end)), default=(math.inf, 0))
            for end in range(count + 1)
        ]
        costs = [least for least, _ in options]
        begins.append([begin for _, begin in options])
    bounds = [count]
    for stage in reversed(begins):
        bounds.append(stage[bounds[-1]])
    return bounds[::-1]
