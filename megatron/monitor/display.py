"""What stands on the screen while training: a live bar in a terminal, and plain lines in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from megatron import logs
from megatron.monitor.throughput import Speed

logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Shown:
    """The numbers of one step that a person follows; seconds_left counts the remaining steps.

    skipped: steps whose update was left out. incidents: how many of each kind there were: "spike", "not_finite",
    "rollback"."""

    iteration: int
    total_iterations: int
    loss: float
    learning_rate: float
    grad_norm: float
    clipped_grad_norm: float
    speed: Speed
    seconds_left: float
    loss_scale: float = 1.0
    skipped: int = 0
    incidents: Mapping[str, int] = field(default_factory=dict)

    def numbers(self) -> list[str]:
        """Return the numbers as short texts."""
        norm = f"grad norm {self.grad_norm:#.3g}"
        if self.clipped_grad_norm < self.grad_norm * 0.9995:
            norm += f" -> {self.clipped_grad_norm:#.3g}"
        texts = [f"loss {self.loss:.4f}", f"lr {self.learning_rate:.2e}", norm]
        texts.append(f"{self.speed.tokens_per_second:,.0f} tokens/s")
        if self.speed.mfu is not None:
            causal = f" ({self.speed.causal_mfu:.1%} causal)" if self.speed.causal_mfu is not None else ""
            texts.append(f"MFU {self.speed.mfu:.1%}{causal}")
        if self.loss_scale != 1:
            texts.append(f"loss scale {self.loss_scale:g}")
        if self.skipped:
            texts.append(f"{self.skipped} skipped")
        texts += [f"{count} {_named(kind, count)}" for kind, count in self.incidents.items()]
        return texts


def _named(kind: str, count: int) -> str:
    """Return a kind of incident in words: "2 spikes", "1 rollback", "3 not finite"."""
    return "not finite" if kind == "not_finite" else kind + "s" * (count > 1)


class Display(Protocol):
    """Shows steps; `is_due` says whether the next `show` is wanted now."""

    def is_due(self, iteration: int) -> bool:
        """Return whether this iteration should be shown."""
        ...

    def show(self, shown: Shown) -> None:
        """Show an iteration."""
        ...

    def close(self) -> None:
        """Leave the screen as it should stay."""
        ...


class Silent:
    """Shows nothing: for all ranks but the first."""

    def is_due(self, iteration: int) -> bool:
        """Return False."""
        return False

    def show(self, shown: Shown) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Lines:
    """One line every `log_interval` steps, the first and the last step."""

    def __init__(self, total_iterations: int, log_interval: int) -> None:
        self.total_iterations, self.log_interval = total_iterations, log_interval
        self._is_first = True

    def is_due(self, iteration: int) -> bool:
        """Return whether this iteration has a line."""
        return self._is_first or iteration % self.log_interval == 0 or iteration == self.total_iterations

    def show(self, shown: Shown) -> None:
        """Write the line of an iteration."""
        self._is_first = False
        width = len(str(shown.total_iterations))
        place = f"iteration {shown.iteration:>{width}}/{shown.total_iterations}"
        logger.info(" | ".join([place, *shown.numbers(), f"{clock_time(shown.seconds_left)} left"]))

    def close(self) -> None:
        """Do nothing."""


_LEAST_BAR = 4


class Bar:
    """A live bar at the bottom of the terminal; messages pass above it. Redrawn at most five times a second."""

    def __init__(self, total_iterations: int, completed: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        self._progress = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(bar_width=None, table_column=Column(min_width=_LEAST_BAR, ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            console=Console(stderr=True),
            refresh_per_second=5,
            expand=True,
        )
        self._task = self._progress.add_task(
            "the first step takes longest", total=total_iterations, completed=completed
        )
        self._progress.start()
        self._drawn = -math.inf

    def is_due(self, iteration: int) -> bool:
        """Return whether the bar was last redrawn more than 0.2 s ago, or this is the last step."""
        return time.monotonic() - self._drawn > 0.2 or iteration == self._progress.tasks[0].total

    def show(self, shown: Shown) -> None:
        """Redraw the bar."""
        self._drawn = time.monotonic()
        left = f"{clock_time(shown.seconds_left)} left"
        # Percentage and bar, with the spaces between the columns, and "iteration/total".
        room = self._progress.console.width - _LEAST_BAR - 9 - 2 * len(str(shown.total_iterations))
        text = "  ".join([*fit(shown.numbers(), room - len(left)), left])
        self._progress.update(self._task, completed=shown.iteration, description=text)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        self._progress.stop()


def fit(texts: list[str], width: int) -> list[str]:
    """Return the texts that fit into `width` columns: on a narrow terminal they are shortened, and the norm, then the
    loss scale, the rate and MFU are left out."""
    for left_out in ("", *_LEFT_OUT):
        if sum(len(text) + 2 for text in texts) <= width:
            break
        texts = [text for text in map(_short, texts) if not left_out or not text.startswith(left_out)]
    return texts


_LEFT_OUT = ("grad norm", "loss scale", "lr", "MFU")


def _short(text: str) -> str:
    """Return "1,234 tokens/s" as "1,234 tok/s" and "MFU 41.2% (38.0% causal)" as "MFU 41.2%"."""
    return text.replace("tokens/s", "tok/s").partition(" (")[0]


def clock_time(seconds: float) -> str:
    """Return a duration: `0:42`, `12:05`, `3:07:00`, `2 d 03:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def build_display(total_iterations: int, completed: int, log_interval: int) -> Display:
    """Return the display of the first rank: a bar where stderr is a terminal, else lines."""
    if sys.stderr.isatty():
        try:
            return Bar(total_iterations, completed)
        except ImportError:
            logger.warning("The progress bar needs rich: pip install rich. Until then there are plain lines.")
    return Lines(total_iterations, log_interval)
