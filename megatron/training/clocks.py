"""What the clock asks of a run: to save after some minutes, and to stop before its time is over.

Rank 0's clock alone decides, and its wishes travel with the steps, so that clocks which differ cost nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from megatron.config.duration import seconds_of
from megatron.config.schema.config import Config
from megatron.engine.wishes import Wish
from megatron.logs import get_logger

logger = get_logger(__name__)

LEAST_MARGIN = 120.0
"""Seconds before the end of a Slurm job at which a run stops at the latest."""
LAUNCH_TIME = "DEEPY_LAUNCH_TIME"
SLURM_END = "SLURM_JOB_END_TIME"


class Clocks:
    """The deadlines of a run, by the clock of this process.

    environ: holds the time of the launch and, in a Slurm job, of its end, both in seconds since the epoch.
    late: steps that are queued before the result of one is read, and with it what the ranks wish.
    now: the time in seconds since the epoch.
    """

    def __init__(
        self, config: Config, environ: Mapping[str, str], late: int = 0, now: Callable[[], float] = time.time
    ) -> None:
        stopping, interval = config.stopping, config.checkpoint.checkpoint_interval_minutes
        self._now, self._late = now, late
        self._interval = 60 * interval if interval is not None and config.checkpoint.save else None
        self._saved_at = now()
        launch = _number(environ, LAUNCH_TIME)
        limit = stopping.max_wall_time
        self._wall_end = None if limit is None else (launch or now()) + seconds_of(limit)
        self._margin = None if stopping.slurm_stop_minutes is None else 60 * stopping.slurm_stop_minutes
        self._slurm_end = None if self._margin == 0 else _number(environ, SLURM_END)
        self._asked_at: float | None = None
        self._gaps: deque[float] = deque([0.0], maxlen=200)
        self._save_seconds = 0.0
        if self._slurm_end is not None and self._slurm_end <= now():
            logger.warning("%s = %s has passed already: it is not looked at", SLURM_END, environ[SLURM_END])
            self._slurm_end = None

    def wishes(self) -> set[Wish]:
        """Return what is wished now; to be called once for each step and batch of a validation, which it measures."""
        now = self._now()
        if self._asked_at is not None:
            self._gaps.append(now - self._asked_at)
        self._asked_at = now
        due = {
            Wish.SAVE: None if self._interval is None else self._saved_at + self._interval,
            Wish.WALL_TIME: self._wall_end,
            Wish.SLURM_END: None if self._slurm_end is None else self._slurm_end - self.margin(),
        }
        return {wish for wish, moment in due.items() if moment is not None and now >= moment}

    @property
    def wall_seconds(self) -> float | None:
        """The seconds that are left of max_wall_time, below 0 where it is over; None: there is no limit."""
        return None if self._wall_end is None else self._wall_end - self._now()

    def margin(self) -> float:
        """Return how many seconds before the end of the Slurm job the run stops.

        Between the wish and the save lie a step and those that are read late; the slowest of the last ones, and twice
        the slowest save, are granted."""
        if self._margin is not None:
            return self._margin
        return max(LEAST_MARGIN, (2 + self._late) * max(self._gaps) + 2 * self._save_seconds)

    def saved(self, seconds: float) -> None:
        """Say that a save ended now, or failed now, after so many seconds."""
        self._saved_at = self._now()
        self._save_seconds = max(self._save_seconds, seconds)
        self._asked_at = None  # the time that it took is no step's

    def wrote(self, seconds: float) -> None:
        """Say how long a checkpoint took to be written, which in the background is longer than training stood still."""
        self._save_seconds = max(self._save_seconds, seconds)


def _number(environ: Mapping[str, str], name: str) -> float | None:
    """Return a variable's number, or None where it is missing or is none."""
    try:
        return float(environ[name])
    except (KeyError, ValueError):
        return None
