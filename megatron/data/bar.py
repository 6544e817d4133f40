"""The progress bar of the data tools: how much is done, how fast, how long still; lines where there is no terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.1
LINE_SECONDS = 10.0
"""Without a terminal (a log file, a batch job) a line is written this often."""


class Bar:
    """A bar from 0 to `total`.

    title: what is being done. unit: "MB" counts bytes and shows millions of them; any other unit is shown as it is.
    """

    def __init__(self, title: str, total: int, unit: str = "MB") -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self.start = self.last_line = time.perf_counter()
        self.note = ""
        # Without a thread of its own (auto_refresh): worker processes are forked while the bar is shown.
        self._rich = Progress(
            *("{task.description}", BarColumn(), TaskProgressColumn(), "{task.fields[rate]}"),
            *(TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
            console=Console(file=sys.stderr),
            auto_refresh=False,
        )
        self._task = self._rich.add_task(title, total=total, rate="", note="")
        self._terminal = self._rich.console.is_terminal
        if self._terminal:
            self._rich.start()

    def advance(self, amount: int, note: str | None = None) -> None:
        """Move on by `amount` bytes or things; `note` is shown after the bar, None keeps it."""
        self.done += amount
        self.note = self.note if note is None else note
        if self._terminal:
            shown_again = time.perf_counter() - self.last_line >= REFRESH_SECONDS or self.done >= self.total
            self._rich.update(self._task, completed=self.done, rate=self._rate(), note=self.note, refresh=shown_again)
            self.last_line = time.perf_counter() if shown_again else self.last_line
        elif time.perf_counter() - self.last_line >= LINE_SECONDS:
            self.last_line = time.perf_counter()
            share = f"{self.done / self.total:.0%}, " if self.total else ""
            self.message(f"{self.title}: {share}{self._rate()}, {self._left()} left, {self.note}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._terminal:
            self._rich.stop()

    def _rate(self) -> str:
        seconds = max(1e-9, time.perf_counter() - self.start)
        return (
            f"{self.done / 1e6 / seconds:.1f} MB/s"
            if self.unit == "MB"
            else f"{self.done / seconds:,.0f} {self.unit}/s"
        )

    def _left(self) -> str:
        seconds = (time.perf_counter() - self.start) * max(0, self.total - self.done) / max(1, self.done)
        return f"{seconds / 60:.0f} min" if seconds > 120 else f"{seconds:.0f} s"
