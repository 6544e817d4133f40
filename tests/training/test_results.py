"""Results that are read late: in order, none lost, with the seconds of the run shared out among them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron import whereabouts
from megatron.engine.base import StepResult
from megatron.engine.wishes import NONE, Wish
from megatron.training.progress import Progress
from megatron.training.results import Results
from megatron.whereabouts import Phase


@dataclass
class Told:
    """In the place of a monitor."""

    steps: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def start_step(self, iteration: int) -> None:
        pass

    def log_step(self, iteration: int, values: StepResult, seconds: float) -> None:
        self.steps.append((iteration, values.loss))
        self.seconds.append(seconds)


@dataclass
class Queued:
    """In the place of a pending step; `error` is what reading it raises."""

    number: int
    error: Exception | None = None
    wishes: frozenset[Wish] = NONE

    def read(self) -> StepResult:
        if self.error is not None:
            raise self.error
        return StepResult(float(self.number), 10, 0.1, 1.0, 1.0, skipped=self.number == 2, wishes=self.wishes)


def run(results: Results, steps: list[Queued], pauses: tuple[int, ...] = (), until: list[Any] | None = None) -> Any:
    progress = Progress()
    for step in steps:
        results.start(progress.iteration + 1)
        time.sleep(0.002)
        progress = results.add(step, progress.after_step(4), everything=step.number in pauses)
        if until is not None:
            until.append((progress.iteration, set(results.wishes)))
    return progress


@pytest.mark.parametrize("late", [0, 1, 2, 9])
def test_every_step_is_told_once_and_in_order(late: int) -> None:
    told = Told()
    begin = time.perf_counter()
    with Results(told, late) as results:  # type: ignore[arg-type]
        progress = run(results, [Queued(number) for number in range(1, 6)], pauses=(3,))
        assert len(told.steps) == max(3, 5 - late)
        progress = results.finish(progress)
    assert told.steps == [(number, float(number)) for number in range(1, 6)]
    assert progress == Progress(iteration=5, consumed_samples=20, consumed_tokens=50, skipped_iterations=1)
    assert 5 * 0.002 <= sum(told.seconds) <= time.perf_counter() - begin


def test_before_a_pause_the_progress_counts_all_steps() -> None:
    results = Results(Told(), late=2)  # type: ignore[arg-type]
    progress = run(results, [Queued(1), Queued(2)])
    assert (progress.iteration, progress.consumed_tokens) == (2, 0)
    progress = results.add(Queued(3), progress.after_step(4), everything=True)
    assert (progress.iteration, progress.consumed_tokens, progress.skipped_iterations) == (3, 30, 1)


def test_a_wish_is_heard_when_its_step_is_read() -> None:
    seen: list[Any] = []
    wishes = [NONE, frozenset({Wish.SAVE}), NONE, frozenset({Wish.SIGTERM, Wish.SAVE}), NONE]
    steps = [Queued(number, wishes=wish) for number, wish in enumerate(wishes, start=1)]
    run(Results(Told(), late=2), steps, until=seen)  # type: ignore[arg-type]
    assert seen == [(1, set()), (2, set()), (3, set()), (4, {Wish.SAVE}), (5, {Wish.SAVE})]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the data ended"), SystemExit(3)])
def test_an_error_loses_no_step_that_was_done(error: BaseException) -> None:
    told = Told()

    def fail() -> None:
        with Results(told, late=3) as results:  # type: ignore[arg-type]
            run(results, [Queued(number) for number in range(1, 5)])
            assert [step for step, _ in told.steps] == [1]
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [step for step, _ in told.steps] == [1, 2, 3, 4]


def test_a_step_that_fails_is_the_error_of_the_run_and_those_before_it_are_told() -> None:
    told = Told()
    steps = [Queued(1), Queued(2), Queued(3, ValueError("diverged")), Queued(4, OSError("the device is lost"))]
    with pytest.raises(ValueError, match="diverged"), Results(told, late=9) as results:  # type: ignore[arg-type]
        results.finish(run(results, steps))
    assert [step for step, _ in told.steps] == [1, 2]


def test_a_batch_without_labels_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Masked(Queued):
        def read(self) -> StepResult:
            return StepResult(0.0, 0, 0.1, 0.0, 0.0)

    run(Results(Told(), late=0), [Masked(1)])  # type: ignore[arg-type]
    assert "iteration 1 trained on nothing" in caplog.text


def test_after_an_error_the_place_is_that_of_the_error() -> None:
    """Though the steps that are left are still read."""
    told = Told()

    def fail() -> None:
        with Results(told, late=2) as results:  # type: ignore[arg-type]
            run(results, [Queued(1)])
            assert not told.steps
            whereabouts.begin_step(2)
            whereabouts.enter(Phase.BACKWARD, 1)
            raise ValueError("backward")

    with pytest.raises(ValueError, match="backward"):
        fail()
    assert told.steps
    assert whereabouts.current().doing() == "micro-batch 1, in backward"
