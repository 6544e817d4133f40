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

import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

import torch

from megatron.engine.base import Pending, StepResult
from megatron.engine.wishes import Wish
from megatron.logs import get_logger
from megatron.monitor.build import Monitor
from megatron.training.progress import Progress
from megatron.whereabouts import Phase, enter

logger = get_logger(__name__)

LATE_ON_GPU = 2
"""Steps that a GPU has before it while the host reads what an earlier one did."""


def steps_late(device: torch.device) -> int:
    """Return how many steps late results are read: 0 on a CPU, where a step is done when it is queued."""
    return LATE_ON_GPU if device.type == "cuda" else 0


class Results:
    """Reads the results of steps, and tells them to the monitor.

    late: a step is read once this many more are queued. wishes: what the ranks wished in the steps that were read; for
    the loop to clear.
    """

    def __init__(self, monitor: Monitor, late: int) -> None:
        self._monitor, self._late = monitor, late
        self._queued: deque[tuple[int, Pending]] = deque()
        self._begin = time.perf_counter()
        self._untold = 0.0
        self.wishes: set[Wish] = set()

    def start(self, iteration: int) -> None:
        """Say that the work on a step begins: its batch is fetched and the step is queued."""
        self._monitor.start_step(iteration)
        self._begin = time.perf_counter()

    def add(self, pending: Pending, progress: Progress, everything: bool) -> Progress:
        """Take the step that was queued last, read those that are due, and return the progress with what they did.

        progress: counts this step. everything: read all steps, this one included.
        """
        self._queued.append((progress.iteration, pending))
        return self._read(progress, 0 if everything else self._late)

    def finish(self, progress: Progress) -> Progress:
        """Read what is left, and return the progress with what it did."""
        self._begin = time.perf_counter()
        return self._read(progress, 0)

    def _read(self, progress: Progress, left: int) -> Progress:
        """Read all but `left` steps. The time since the last ones were read is shared out among them."""
        found: list[tuple[int, StepResult]] = []
        try:
            while len(self._queued) > left:
                iteration, pending = self._queued.popleft()
                enter(Phase.RESULT)
                found.append((iteration, pending.read()))
        finally:
            self._untold += time.perf_counter() - self._begin
            if sys.exception() is None:
                enter(Phase.LOGGING)
            for iteration, result in found:
                self._monitor.log_step(iteration, result, self._untold / len(found))
                progress = progress.after_result(result.num_tokens, result.skipped)
                self.wishes |= result.wishes
                if result.num_tokens == 0:
                    logger.warning("iteration %d trained on nothing: all labels of its batch are masked", iteration)
            if found:
                self._untold = 0.0
        return progress

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return
        try:  # what the run ends with is the first error, and not that of a device on which nothing works any more
            self._read(Progress(), 0)
        except Exception as later:
            logger.debug("%d queued steps are lost: %s", len(self._queued) + 1, later)
