"""The results of queued steps, read in their order and a few steps late, so that the host need not wait for the device.

    with Results(monitor, late=2) as results:
        results.start(iteration + 1)
        pending = engine.queue_step(batches, iteration)
        progress = results.add(pending, progress, everything=False)

        progress = results.finish(progress)

After an error too what is left is read, so that no step that was done goes untold. Every rank reads
the same steps at the same moment, since what they say may end the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from megatron.engine.base import NO_LIMITS, Limits, Pending, StepResult
from megatron.engine.wishes import Wish
from megatron.errors import DivergedError
from megatron.logs import get_logger
from megatron.monitor.build import Monitor
from megatron.training.after_load import AfterLoad
from megatron.training.guards import Guards, Incident
from megatron.training.progress import Progress
from megatron.whereabouts import Phase, enter

logger = get_logger(__name__)

LATE_ON_GPU = 2
"""Steps that a GPU has before it while the host reads what an earlier one did."""


def steps_late(device: torch.device) -> int:
    """Return how many steps late results are read: 0 on a CPU, where a step is done when it is queued."""
    return LATE_ON_GPU if device.type == "cuda" else 0


@dataclass(frozen=True)
class _Queued:
    """A step whose result is not read yet. samples: where it begins and ends. limits: what it was given."""

    iteration: int
    samples: tuple[int, int]
    limits: Limits
    pending: Pending


class Results:
    """Reads the results of steps, and tells them to the monitor.

    late: a step is read once this many more are queued. guards: which of them are incidents. after_load: looks at
    the first ones, where the run has loaded weights. wishes: what the ranks wished in the steps that were read; for
    the loop to clear. diverged: the step whose result was the error DivergedError.
    """

    def __init__(
        self, monitor: Monitor, late: int, guards: Guards | None = None, after_load: AfterLoad | None = None
    ) -> None:
        self._monitor, self._late = monitor, late
        self._guards, self._after_load = guards or Guards(), after_load
        self._queued: deque[_Queued] = deque()
        self._incidents: list[Incident] = []
        self.diverged: Incident | None = None
        self._begin = time.perf_counter()
        self._untold = 0.0
        self.wishes: set[Wish] = set()

    def start(self, iteration: int) -> None:
        """Say that the work on a step begins: its batch is fetched and the step is queued."""
        self._monitor.start_step(iteration)
        self._begin = time.perf_counter()

    def add(
        self, pending: Pending, progress: Progress, everything: bool, begin: int = 0, limits: Limits = NO_LIMITS
    ) -> Progress:
        """Take the step that was queued last, read those that are due, and return the progress with what they did.

        progress: counts this step. everything: read all steps, this one included. begin: the samples that were
        consumed before it. limits: what it was given.
        """
        samples = (begin, progress.consumed_samples)
        self._queued.append(_Queued(progress.iteration, samples, limits, pending))
        return self._read(progress, 0 if everything else self._late)

    def finish(self, progress: Progress) -> Progress:
        """Read what is left, and return the progress with what it did."""
        self._begin = time.perf_counter()
        return self._read(progress, 0)

    def take_incidents(self) -> list[Incident]:
        """Return the steps that were left out, of those read since the last call."""
        found, self._incidents = self._incidents, []
        return found

    def drop(self) -> None:
        """Forget the steps that are queued, and the incidents that were found: the run goes back before them."""
        self._queued.clear()
        self._incidents.clear()

    def _read(self, progress: Progress, left: int) -> Progress:
        """Read all but `left` steps. The time since the last ones were read is shared out among them."""
        found: list[tuple[_Queued, StepResult]] = []
        try:
            while len(self._queued) > left:
                step = self._queued.popleft()
                _mark(Phase.RESULT)
                found.append((step, self._result_of(step)))
        finally:
            self._untold += time.perf_counter() - self._begin
            _mark(Phase.LOGGING)
            for step, result in found:
                self._monitor.log_step(step.iteration, result, self._untold / len(found))
                progress = self._count(progress, step, result)
            if found:
                self._untold = 0.0
        if self._after_load is not None:
            for step, result in found:
                self._after_load.look(step.iteration, result)
        return progress

    def _result_of(self, step: _Queued) -> StepResult:
        try:
            return step.pending.read()
        except DivergedError:
            unknown = StepResult(math.nan, 0, math.nan, math.inf, math.inf, skipped=True, not_finite=True)
            self.diverged = Incident("not finite", step.iteration, *step.samples, unknown)
            raise

    def _count(self, progress: Progress, step: _Queued, result: StepResult) -> Progress:
        guard, incident = self._guards.after(progress.guard, step.iteration, step.samples, result, step.limits)
        if incident is not None:
            self._incidents.append(incident)
        self.wishes |= result.wishes
        if result.num_tokens == 0:
            logger.warning("iteration %d trained on nothing: all labels of its batch are masked", step.iteration)
        return progress.after_result(result.num_tokens, result.skipped, guard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return
        try:  # what the run ends with is the first error, and not that of a device on which nothing works any more
            self._read(Progress(), 0)
        except Exception as later:
            logger.debug("%d queued steps are lost: %s", len(self._queued) + 1, later)


def _mark(phase: Phase) -> None:
    """Say what this rank does, unless an error is on its way: the report names the place of the error."""
    if sys.exception() is None:
        enter(phase)
