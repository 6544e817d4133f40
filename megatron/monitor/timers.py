"""Where the time of a step goes: named stretches of wall time.

    timers = Timers()
    with timers.measure("batch"):
        batches = next(loader)
    timers.drain()  # {"batch": 0.0021}: seconds per call since the last drain

On a GPU the stretches hold what the CPU waited for, since kernels run behind it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Sums of seconds and counts of calls, by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begin
            self._calls[name] += 1

    def drain(self) -> dict[str, float]:
        """Return the mean seconds per call of each name, and start anew."""
        means = {name: seconds / self._calls[name] for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._calls.clear()
        return means
