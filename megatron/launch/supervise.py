"""Start the ranks of this machine, watch over them, and end all of them when one fails.

Ranks are forked from the launcher, which has loaded neither torch nor any thread: a fork costs a millisecond and
the parsed config comes along. The launcher forwards SIGINT, SIGTERM, SIGHUP and SIGUSR1, reaps every rank, and
prints the first cause once and last.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from megatron import whereabouts
from megatron.launch import flight, stacks
from megatron.launch.board import VARIABLE, Board
from megatron.launch.failure import Failure, first_cause, from_exception, from_exit, from_hang
from megatron.launch.hang import Seen, Stillness, missing, report, warning
from megatron.launch.stacks import Doing

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_FROM_KERNEL = 0x80  # SI_KERNEL of sigaction(2): a key in the terminal, which every rank has received as well


@dataclass(frozen=True)
class Patience:
    """Seconds granted before the next sharper signal.

    echo: after the first failure, for other ranks to report theirs before SIGTERM.
    failed: between SIGTERM and SIGKILL once a rank has failed.
    asked: between a forwarded SIGTERM and SIGKILL: the time to end the step under way and to save a checkpoint. Who
        sent it has less patience, and its own SIGKILL.
    interrupted: between a forwarded SIGINT and SIGTERM.
    """

    echo: float = 0.3
    failed: float = 1.0
    asked: float = 3600.0
    interrupted: float = 5.0


@dataclass
class _Ranks:
    """The processes of this machine: `alive` maps pid to local rank; `failures` those that ended badly."""

    board: Board
    world_size: int
    alive: dict[int, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    signalled: set[int] = field(default_factory=set)
    finished: list[int] = field(default_factory=list)
    stillness: Stillness = field(default_factory=lambda: Stillness(None))

    def send(self, number: int) -> None:
        """Send a signal to every rank that lives."""
        self.signalled.add(number)
        for pid in self.alive:
            os.kill(pid, number)

    def reap(self) -> None:
        """Take leave of every rank that has ended."""
        for pid, local_rank in list(self.alive.items()):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                del self.alive[pid]
                self._note_end(local_rank, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)

    def look(self, now: float) -> None:
        """Warn of a run that seems to hang, and note a failure where it does."""
        if self.failures or not self.alive or self.stillness.limit is None:
            return
        positions = {rank: self.board.position(rank) for rank in self.alive.values()}
        found = self.stillness.look(positions, now)
        if not found:
            return
        host = socket.gethostname()
        doing = {
            rank: self.board.ask(rank, pid) if found == "hang" else stacks.glance(pid)
            for pid, rank in self.alive.items()
        }
        if found == "hang":
            records = flight.ask(self.board.folder, doing)
            doing = {rank: replace(one, record=records.get(rank, "")) for rank, one in doing.items()}
        seen = [Seen(rank, host, positions[rank], doing[rank]) for rank in positions]
        seen += [Seen(rank, host, self.board.position(rank), Doing("gone")) for rank in self.finished]
        if found == "warning":
            print(f"\n{warning(seen, self.stillness)}", file=sys.stderr, flush=True)
            return
        rank = min(one.rank for one in missing(seen) or seen)
        self.failures.append(from_hang(report(seen, self.stillness.idle), rank, self.world_size, host))

    def _note_end(self, local_rank: int, status: int, peak_bytes: int) -> None:
        if status == 0:
            self.finished.append(local_rank)
        if status == 0 or -status in self.signalled or status - 128 in self.signalled:
            return
        posted = self.board.failure(local_rank)
        if posted is None and signal.SIGINT in self.signalled:
            return
        host, position = socket.gethostname(), self.board.position(local_rank)
        self.failures.append(posted or from_exit(status, peak_bytes, local_rank, self.world_size, host, position))


def run_ranks(
    body: Callable[[int], int],
    environments: Sequence[Mapping[str, str]],
    patience: Patience | None = None,
    hang_seconds: float | None = None,
) -> int:
    """Run `body(local_rank)` in a process of its own for each environment; return the exit code of the run.

    body: its return value is the rank's exit code; an exception is reported.
    environments: variables set in each rank, on top of ours. One machine only: the local rank is the global rank.
    hang_seconds: after which a run whose ranks do not move is ended, with a report; None: never.

    Returns 0 when all ranks returned 0; the failed rank's code (128 + n for signal n), which is that of a stop where a
    rank has reported one; 130, 143 or 138 after Ctrl-C, SIGTERM or SIGUSR1 that ended the ranks.
    """
    board = Board.create(len(environments))
    ranks = _Ranks(board, len(environments), stillness=Stillness(hang_seconds))
    launcher, listened = os.getpid(), _listened()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, listened)
    try:
        for local_rank, environment in enumerate(environments):
            pid = os.fork()
            if pid == 0:
                signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
                os.environ.update({**environment, VARIABLE: str(board.folder)})
                _become_rank(body, local_rank, board, launcher)
            ranks.alive[pid] = local_rank
        asked = _watch(ranks, patience or Patience(), listened)
        positions = [board.position(rank) for rank in range(len(environments))]
        steps = [position.step for position in positions if position is not None and position.step is not None]
    finally:
        ranks.send(signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        board.remove()
    if len(ranks.finished) == len(environments):
        asked = None  # the signal came too late to stop anything
    return _conclude(ranks.failures, asked, max(steps, default=None))


def _listened() -> set[signal.Signals]:
    """Return the signals that the launcher takes; nohup's SIGHUP is for nobody, though a blocked one would arrive."""
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {*FORWARDED, signal.SIGCHLD} - ({signal.SIGHUP} if is_nohup else set())


def _watch(ranks: _Ranks, patience: Patience, listened: set[signal.Signals]) -> int | None:
    """Wait until no rank lives; return the first signal that asked the run to end, if one did."""
    asked: int | None = None
    schedule: list[tuple[float, int]] = []
    while ranks.alive:
        wait = max(0.0, schedule[0][0] - time.monotonic()) if schedule else 1.0
        info = signal.sigtimedwait(listened, min(wait, ranks.stillness.interval))
        now = time.monotonic()
        if info is not None and info.si_signo in FORWARDED:
            asked = asked or info.si_signo
            ranks.signalled.add(info.si_signo)
            if info.si_code != _FROM_KERNEL:
                ranks.send(info.si_signo)
            is_interrupt = info.si_signo == signal.SIGINT
            first = now + (patience.interrupted if is_interrupt else patience.asked)
            if info.si_signo != signal.SIGUSR1:
                schedule = [(first, signal.SIGTERM), (first + patience.failed, signal.SIGKILL)]
        while schedule and schedule[0][0] <= now:
            ranks.send(schedule.pop(0)[1])
        had_failed = bool(ranks.failures)
        ranks.reap()
        if signal.SIGINT not in ranks.signalled:
            ranks.look(now)
        if ranks.failures and not had_failed:
            first = now + patience.echo
            schedule = [(first, signal.SIGTERM), (first + patience.failed, signal.SIGKILL)]
    return asked


def _conclude(failures: list[Failure], asked: int | None, step: int | None) -> int:
    """Print the first cause or who stopped the run, once, and return the exit code."""
    sys.stdout.flush()
    if failures:
        cause = first_cause(failures)
        print(f"\n{cause}", file=sys.stderr, flush=True)
        return cause.exit_code or 1
    if asked is None:
        return 0
    at = "before the first step" if step is None else f"in step {step}"
    print(f"\nstopped by {signal.Signals(asked).name} {at}.", file=sys.stderr, flush=True)
    return 128 + asked


def _become_rank(body: Callable[[int], int], local_rank: int, board: Board, launcher: int) -> NoReturn:
    """In the forked child: run the body, report an exception, and leave without returning."""
    exit_code = 1
    try:
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != launcher:
            os._exit(1)
        whereabouts.reset()
        board.hold_position(local_rank)
        board.answer(local_rank)
        exit_code = body(local_rank)
    except SystemExit as leaving:
        exit_code = _exit_code_of(leaving)
    except KeyboardInterrupt:
        exit_code = 130
    except BaseException as error:
        world_size, host = int(os.environ.get("WORLD_SIZE", "1")), socket.gethostname()
        failure = from_exception(error, local_rank, world_size, host, whereabouts.current())
        board.post(local_rank, failure)
        exit_code = failure.exit_code
    finally:
        _leave(exit_code)


def _exit_code_of(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _leave(exit_code: int) -> NoReturn:
    """End this process as the interpreter would, without taking torch's modules apart (0.1 to 0.3 s)."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)
