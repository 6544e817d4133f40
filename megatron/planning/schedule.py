"""The 1F1B pipeline schedule (Narayanan et al. 2021), simulated: how long a step takes and how much of it is idle.

Stage i of p first runs min(p - i - 1, m) forward passes, then one forward and one backward in turn, then the backward
passes that are left. A forward pass waits for the stage before, a backward pass for the stage behind.

    equal stages: idle share of the step = (p - 1) / (m + p - 1), which is `parallel.pipeline.bubble_fraction`
"""

from __future__ import annotations

from collections.abc import Sequence


def order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Return what a stage runs, in order, as ("forward" or "backward", micro-batch)."""
    warm_up = min(stages - stage - 1, micro_batches)
    result = [("forward", index) for index in range(warm_up)]
    for index in range(micro_batches - warm_up):
        result += [("forward", warm_up + index), ("backward", index)]
    return result + [("backward", index) for index in range(micro_batches - warm_up, micro_batches)]


def step_time(forward: Sequence[float], backward: Sequence[float], micro_batches: int) -> float:
    """Return the time of a step, simulated; times of one micro-batch on each stage, in any one unit.

    Communication between stages is taken to cost nothing of its own."""
    count = len(forward)
    orders = [order(stage, count, micro_batches) for stage in range(count)]
    position, clock = [0] * count, [0.0] * count
    done: dict[tuple[str, int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for stage in range(count):
            while position[stage] < len(orders[stage]):
                kind, index = orders[stage][position[stage]]
                needs = _needs(kind, stage, index, count)
                if needs is not None and needs not in done:
                    break
                start = max(clock[stage], done[needs] if needs is not None else 0.0)
                clock[stage] = start + (forward if kind == "forward" else backward)[stage]
                done[kind, stage, index] = clock[stage]
                position[stage] += 1
                moved = True
    return max(clock)


def _needs(kind: str, stage: int, index: int, stages: int) -> tuple[str, int, int] | None:
    """Return what must be done before, on another stage; what the same stage did before is in its order."""
    if kind == "forward":
        return ("forward", stage - 1, index) if stage else None
    return ("backward", stage + 1, index) if stage < stages - 1 else None


def estimate(forward: Sequence[float], backward: Sequence[float], micro_batches: int) -> float:
    """Return the time of a step without simulation: one micro-batch through all stages, the
    others through the slowest.

    It is exact for equal stages, and a little too long where a stage other than the last is much the slowest."""
    times = [one + two for one, two in zip(forward, backward, strict=True)]
    return sum(times) + (micro_batches - 1) * max(times)
