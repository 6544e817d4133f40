"""Python's garbage collector, kept out of the steps of training.

A full collection goes through every object that is alive, of which a run with torch has a million: 0.1 to 0.5 s in the
middle of a step, on one rank, for which all others wait. So once the first steps have made what stays, that is set
aside for good (`gc.freeze`) and collection is switched off, except between steps when the run stops for other reasons.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Self

WARM_STEPS = 3
"""Steps after which everything that a run keeps exists: optimizer state, buffers, compiled code, open files."""

MOST_STEPS = 1000
"""Steps after which garbage is collected where nothing else interrupts them."""


class Collector:
    """Decides when garbage is collected, between entering and leaving; afterwards Python decides as before."""

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        self._steps = 0

    def __enter__(self) -> Self:
        return self

    def after_step(self, pauses: bool) -> None:
        """Count a step. pauses: the run validates, saves or compares now, and waits anyway."""
        self._steps += 1
        if self._steps == WARM_STEPS:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps > WARM_STEPS and (pauses or self._steps % MOST_STEPS == 0):
            gc.collect()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._steps >= WARM_STEPS:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()
