"""What is asked of this process by signals: to stop and keep what it has (SIGTERM, SIGUSR1), or to end at once (SIGTERM
again).

    inbox = signals.open_inbox()      # early: until then a signal simply ends the process
    inbox.on_first(end)               # while there is nothing to lose: `end` ends the process, whatever it waits for
    inbox.hold()                      # from now on a signal is only noted, for whoever asks
    inbox.numbers                     # the signals that came, in order

A thread hears of a signal even where the main thread is inside a collective that never ends, because the system's
handler writes into a pipe. A scheduler and a launcher may both pass the same SIGTERM on, over ssh too, so that a second
one counts only some seconds later; and never in a Slurm job, since Slurm sends another one half a minute before it
kills, at the end of a grace time which a save may still need. Nothing but the standard library is used here, and
nothing newer than Python 3.8.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is lost, start me again. The config may name another."""
NOTHING_LOST = "before its first step: nothing is lost; start the same command again."
ECHO_SECONDS = 5.0
"""A SIGTERM that comes sooner after the one before is the same request, passed on by somebody else."""


class Inbox:
    """The signals that this process was sent since it was opened; one for each process, see `open_inbox`."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._end: Callable[[int], None] | None = None
        self._last_term: float | None = None
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in STOPPING:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def on_first(self, end: Callable[[int], None]) -> None:
        """Call `end(number)` in a thread when a signal comes, or now if one has come; it should end the process."""
        with self._lock:
            self._end = end
        if self.numbers:
            end(self.numbers[0])

    def hold(self) -> None:
        """Only note signals from now on; waits for an `end` that has begun."""
        with self._lock:
            self._end = None

    def close(self) -> None:
        """Let signals end the process again."""
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._writer)

    def forget(self) -> None:
        """In a fork of the process: leave the pipe, which is the parent's."""
        self.close()
        os.close(self._reader)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal in the main thread, as soon as it runs Python."""
        self.numbers.append(number)

    def _listen(self) -> None:
        while True:
            sent = os.read(self._reader, 64)
            if not sent:
                os.close(self._reader)
                return
            for number in sent:
                if number in STOPPING:
                    self._take(number)

    def expire(self, end: Callable[[], None]) -> None:
        """Call `end`, which should end the process, if signals still end it: its time is over before it began."""
        with self._lock:
            if self._end is not None:
                end()

    def _take(self, number: int) -> None:
        if number == signal.SIGTERM:
            now, before = time.monotonic(), self._last_term
            self._last_term = now
            if before is not None and now - before > ECHO_SECONDS and "SLURM_JOB_ID" not in os.environ:
                leave(128 + number)
        with self._lock:
            if self._end is not None:
                self._end(number)


def leave(exit_code: int) -> None:
    """End the process here and now, from any thread; what it has printed is not lost."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


_OPEN: list[Inbox] = []


def open_inbox() -> Inbox:
    """Return the process's inbox, opened if it was not; only the main thread may open it."""
    if not _OPEN:
        _OPEN.append(Inbox())
    return _OPEN[0]


def is_open() -> bool:
    """Say whether somebody has opened the inbox."""
    return bool(_OPEN)


def close_inbox() -> None:
    """Let signals end the process again."""
    if _OPEN:
        _OPEN.pop().close()


def _after_fork() -> None:
    if _OPEN:
        _OPEN.pop().forget()


os.register_at_fork(after_in_child=_after_fork)
