"""Which steps are spikes, and that what is known survives a checkpoint to the last bit."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace

import pytest

from megatron.config.resolve import resolve
from megatron.engine.base import NO_LIMITS, Limits, StepResult
from megatron.training.guards import LAG, Guards, GuardState, Incident
from megatron.training.incidents import rolled_back
from megatron.training.progress import Progress
from tests.config.small import SMALL


def guards(**entries: float) -> Guards:
    block = {"action": "skip", "window": 20, "warmup_steps": 10, **entries}
    return Guards(resolve({**SMALL, "spike_guard": block, "most_not_finite": 3}).training)


def step(loss: float, norm: float = 1.0, limits: Limits = NO_LIMITS) -> StepResult:
    """Return what an engine says of a step with this loss and norm."""
    is_bad = not (math.isfinite(loss) and math.isfinite(norm))
    spiked = not is_bad and (loss > limits.loss or norm > limits.grad_norm)
    return StepResult(loss, 100, 0.1, norm, norm, skipped=is_bad or spiked, not_finite=is_bad, spiked=spiked)


def follow(rule: Guards, losses: list[float], state: GuardState, first: int = 1) -> tuple[GuardState, list[Incident]]:
    found = []
    for iteration, loss in enumerate(losses, start=first):
        limits = rule.limits(state, iteration)
        samples = (4 * iteration - 4, 4 * iteration)
        state, incident = rule.after(state, iteration, samples, step(loss, limits=limits), limits)
        found += [] if incident is None else [incident]
    return state, found


NOISE = [3.0 + random.Random(step).gauss(0, 0.1) for step in range(60)]


def test_the_limit_is_the_formula_over_the_steps_that_are_known() -> None:
    rule = guards(loss_deviations=6.0, least_rise=0.1, grad_norm_multiple=10.0)
    state, _ = follow(rule, NOISE[:30], GuardState())
    known = NOISE[: 31 - 1 - LAG][-20:]
    middle = statistics.median(known)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in known)
    assert rule.limits(state, 31) == Limits(middle + 6 * deviation, 10.0)
    state, _ = follow(rule, NOISE[:10], GuardState())
    assert rule.limits(state, 10 + LAG) == NO_LIMITS, "fewer steps than warmup_steps"
    assert rule.limits(state, 11 + LAG) != NO_LIMITS


@pytest.mark.parametrize("late", [0, 1, LAG])
def test_limits_do_not_depend_on_when_results_are_read(late: int) -> None:
    rule, state, waiting, found = guards(), GuardState(), [], []
    for iteration, loss in enumerate([*NOISE[:30], 9.0, *NOISE[30:40]], start=1):
        limits = rule.limits(state, iteration)
        found.append(limits)
        waiting.append((iteration, (0, 4), step(loss, limits=limits), limits))
        while len(waiting) > late:
            state, _ = rule.after(state, *waiting.pop(0))
    expected, known = [], GuardState()
    for iteration, loss in enumerate([*NOISE[:30], 9.0, *NOISE[30:40]], start=1):
        limits = rule.limits(known, iteration)
        expected.append(limits)
        known, _ = rule.after(known, iteration, (0, 4), step(loss, limits=limits), limits)
    assert found == expected


def test_a_spike_never_enters_the_window_and_is_recorded() -> None:
    state, found = follow(guards(), [*NOISE[:30], 9.0, 9.0, 3.0], GuardState())
    assert [(each.kind, each.iteration, each.in_a_row) for each in found] == [("spike", 31, 1), ("spike", 32, 2)]
    assert [(each.begin, each.end) for each in state.left_out] == [(120, 124), (124, 128)]
    assert state.samples_left_out == 8
    assert max(each.loss for each in state.window) < 4
    assert state.spikes_in_a_row == 0
    assert "the loss 9.0000 is above its limit of" in str(found[0])


def test_a_small_rise_of_a_quiet_loss_is_no_spike() -> None:
    quiet = [2.0] * 30
    assert not follow(guards(least_rise=0.3), [*quiet, 2.29], GuardState())[1]
    assert follow(guards(least_rise=0.3), [*quiet, 2.31], GuardState())[1]
    falling = [8.0 - 0.1 * step for step in range(40)]
    assert not follow(guards(), falling, GuardState())[1]


def test_steps_that_are_not_finite_are_counted_in_a_row() -> None:
    nan = math.nan
    state, found = follow(guards(), [2.0, nan, nan, 2.0, nan], GuardState())
    assert [each.in_a_row for each in found] == [1, 2, 1]
    assert [each.reason for each in state.left_out] == ["not finite"] * 3
    overflow = StepResult(2.0, 100, 0.1, math.inf, math.inf, loss_scale=8.0, skipped=True)
    assert guards().after(state, 6, (0, 4), overflow, NO_LIMITS) == (state, None), "fp16's are no incident"


def test_the_state_survives_a_manifest_to_the_last_bit() -> None:
    state, _ = follow(guards(), [*NOISE[:30], 9.0, math.nan], GuardState())
    progress = Progress(32, 128, 3200, 2, guard=state)
    assert Progress.from_dict(json.loads(json.dumps(progress.as_dict()))) == progress
    old = {"iteration": 3, "consumed_samples": 12, "consumed_tokens": 300, "skipped_iterations": 0}
    assert Progress.from_dict(old) == Progress(3, 12, 300, 0)


def test_rollbacks_to_one_checkpoint_follow_each_other_in_the_record() -> None:
    """Both begin where the run went on, and what was left out in between lies within them."""
    at_checkpoint, _ = follow(guards(), NOISE[:20], GuardState())
    back = Progress(20, 80, guard=at_checkpoint)
    state, found = follow(guards(), [*NOISE[:3], math.nan, 9.0], at_checkpoint, first=21)
    first = rolled_back(state, back, found[-1])
    assert [(each.begin, each.end, each.back_to) for each in first.left_out] == [(80, 100, 20)]
    assert first.window == at_checkpoint.window
    again = replace(found[-1], iteration=23, begin=108, end=112)
    second = rolled_back(first, back, again)
    assert [(each.begin, each.end) for each in second.left_out] == [(80, 100), (100, 112)]
    assert second.rollbacks_to(20) == 2
    assert second.rollbacks_to(40) == 0
