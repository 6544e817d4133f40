"""Stopping before the end: what a rank wishes, what all ranks have agreed on, and what is said in the end.

A rank is asked by SIGTERM or SIGUSR1 (`megatron/signals.py`), rank 0 also by the clock (`clocks.py`). It does nothing
about it, but tells the others: its wishes are numbers in the sum over all ranks that each step, and each batch of a
validation, makes anyway (`engine/wishes.py`). All ranks read the sum of the same step at the same place of the loop.
The step under way is finished, a validation under way is given up (and made again by the run that goes on), a save
under way is finished; then the last save, and the end with `requeue_exit_code`.

Why no rank waits for one that has stopped:

1. Whether to leave the loop is decided from numbers that an all-reduce gave to all ranks, from the iteration and from
   the config, which are the same everywhere; nothing that a rank knows alone enters (but where it is alone). So all
   ranks leave at the same place, with the same collectives behind them and the same before them.
2. Results are read late, but all ranks queue and read the same steps in the same order, so they hear the same at the
   same place.
3. A signal interrupts nothing: its handler appends to a list. A rank that is told after it gave its number to a sum
   tells it in the next one; after the last sum of the run, nobody asks any more, and the run ends as complete.
4. Before the loop there is nothing to agree on, since a signal ends the process at once (in a thread, so also one
   that waits for others): nothing is lost then, for no rank can have finished a step without this one. It leaves a
   report first, by which the launcher, or the watch between the ranks, ends the others with the same exit code.
5. A second SIGTERM ends its process as any failure does, and the others are ended as after any failure.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Collection
from dataclasses import dataclass

from megatron.config.schema.config import Config
from megatron.engine.wishes import NONE, Wish, Wishes
from megatron.parallel.mesh import Mesh
from megatron.signals import Inbox
from megatron.training.clocks import Clocks
from megatron.training.progress import Progress

_TOO_SHORT = ", before a single step was done: the run needs more time than that."
_SIGNALS = {signal.SIGTERM: Wish.SIGTERM, signal.SIGUSR1: Wish.SIGUSR1}


@dataclass(frozen=True)
class Stopped:
    """The end of a run that was asked to stop: its exit code, and in a line why, and how to go on."""

    exit_code: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """How far a run came. stopped: None where it ended by itself."""

    progress: Progress
    stopped: Stopped | None = None


class Agreement:
    """What this rank wishes, and what the ranks have agreed on.

    inbox: where this process's signals arrive; None: it has none. clocks: looked at on rank 0 only.
    reason: why all ranks stop, once they have agreed on it. wants_save: they have agreed to save now.
    """

    def __init__(self, mesh: Mesh, inbox: Inbox | None = None, clocks: Clocks | None = None) -> None:
        self._is_alone = mesh.world.size == 1
        self._inbox = inbox
        self._clocks = clocks if mesh.world.rank == 0 else None
        self.reason: Wish | None = None
        self.wants_save = False

    def wishes(self) -> Wishes:
        """Return what this process wishes; the sum of a step or a batch tells it to the other ranks."""
        asked = self._asked()
        return asked | self._clocks.wishes() if self._clocks is not None else asked

    def _asked(self) -> Wishes:
        numbers = self._inbox.numbers if self._inbox is not None else []
        return frozenset(_SIGNALS[signal.Signals(number)] for number in numbers) if numbers else NONE

    def hear(self, wishes: Collection[Wish]) -> None:
        """Take what a sum over all ranks says, and from it what is agreed on.

        A process that is alone need not wait for a sum to know that it was asked."""
        heard = {*wishes, *(self._asked() if self._is_alone else ())}
        self.wants_save |= Wish.SAVE in heard
        if self.reason is None:
            self.reason = next((wish for wish in Wish if wish in heard and wish is not Wish.SAVE), None)

    def saved(self, seconds: float) -> None:
        """Say that a save has ended, well or not, which took so many seconds: the next interval begins."""
        self.wants_save = False
        if self._clocks is not None:
            self._clocks.saved(seconds)

    def wrote(self, seconds: float) -> None:
        """Say how long a checkpoint took until it was written, in the background too."""
        if self._clocks is not None:
            self._clocks.wrote(seconds)


def stopped(config: Config, reason: Wish, begun: Progress, progress: Progress) -> Stopped:
    """Return how a run ends that was asked to stop, and whose last checkpoint is written.

    begun: where the run began; without any step since then nothing is lost, and nothing was saved.
    """
    settings, again = config.checkpoint, config.stopping.requeue_exit_code
    why = f"stopped at iteration {progress.iteration} because {_because(config, reason)}"
    if progress.iteration == begun.iteration:
        if reason in (Wish.WALL_TIME, Wish.SLURM_END):
            return Stopped(1, f"{why}{_TOO_SHORT}")
        return Stopped(again, f"{why}, before a step was done: nothing is lost; start the same command again.")
    if not settings.save:
        number = {Wish.SIGUSR1: signal.SIGUSR1}.get(reason, signal.SIGTERM)
        steps = progress.iteration - begun.iteration
        text = f"{why}. Nothing was saved, since save is not set: the {steps} steps of this run are lost."
        return Stopped(128 + number, text)
    how = "the same command" if settings.resume == "auto" else "the same command with resume: auto"
    return Stopped(again, f"{why}. {settings.save} holds a checkpoint of it, from which {how} goes on.")


def unbegun(config: Config) -> Stopped:
    """Return how a run ends whose max_wall_time is over before its loop has begun; another turn would end like it."""
    return Stopped(1, f"stopped because {_because(config, Wish.WALL_TIME)}{_TOO_SHORT}")


def _because(config: Config, reason: Wish) -> str:
    limit = config.stopping.max_wall_time
    return {
        Wish.WALL_TIME: f"max_wall_time = {f'{limit:g}' if isinstance(limit, float) else limit} has passed",
        Wish.SLURM_END: f"the Slurm job is about to end (it is {time.strftime('%H:%M:%S')})",
    }.get(reason, f"{reason} asked for it")
