"""`./deepy.py node`: one host's part of a run on several, started there by pdsh and by nobody else.

It starts the host's ranks, passes signals on to them, and ends them when the connection to the first host breaks. That
a rank on another host has failed they learn from each other (`launch/peers.py`); here the rest is only seen off.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron import signals
from megatron.errors import LaunchError, Problem
from megatron.launch.devices import usable_cores, visible_gpus
from megatron.launch.failure import explain_signal
from megatron.launch.hosts import HOSTS_VARIABLE, Host, parse_hosts
from megatron.launch.place import Place
from megatron.launch.remote import RUN_VARIABLE, node_pid_file

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 20.0
"""How long ranks may outlive the first that failed: they learn of it in a second, and let it print its report."""
KILL_SECONDS = 5.0
LATE_SECONDS = 15.0
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(argv: list[str]) -> int:
    """Start this host's ranks: `node INDEX ADDRESS PORT SCRIPT ARGUMENTS...`; return their exit code."""
    index, address, port, script = int(argv[0]), argv[1], int(argv[2]), argv[3]
    environments = node_environments(parse_hosts(os.environ[HOSTS_VARIABLE]), index, address, port, os.environ)
    command = [sys.executable, "-u", script, *argv[4:]]
    folder = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    with _noted_pid(f"{folder}/{node_pid_file(os.environ[RUN_VARIABLE], index)}"):
        return Ranks(command, environments).see_through(sys.stdin.fileno())


def node_environments(
    hosts: Sequence[Host], index: int, address: str, port: int, environ: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return the variables of each rank of host number `index`.

    Raises LaunchError where this machine shows fewer GPUs than its slots say."""
    slots, gpus = hosts[index].slots, visible_gpus(environ)
    first, world_size = sum(len(host.slots) for host in hosts[:index]), sum(len(host.slots) for host in hosts)
    shared = {"DS_ACCELERATOR": environ.get("DS_ACCELERATOR", "cuda" if gpus else "cpu")}
    if gpus:
        if max(slots) >= len(gpus):
            raise LaunchError(
                Problem(
                    f"host {hosts[index].name} ({socket.gethostname()})",
                    f"shows {len(gpus)} GPUs, and slot {max(slots)} was asked of it.",
                    "Correct the number of slots in the hostfile, or set include, exclude or num_gpus.",
                )
            )
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot] for slot in slots)
    if "OMP_NUM_THREADS" not in environ:
        shared["OMP_NUM_THREADS"] = str(max(1, usable_cores() // len(slots)))
    places = [Place(first + n, world_size, n, len(slots), address, port) for n in range(len(slots))]
    return [{**place.environment(), **shared} for place in places]


class Ranks:
    """The processes of this host's ranks, from their start to the end of the last."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker)
        for number in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the number arrives in the pipe
        self.alive = {
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM),
            ): environment["RANK"]
            for environment in environments
        }
        self.codes: list[int] = []
        self._sent: set[int] = set()
        self._cut_at: float | None = None

    def see_through(self, connection: int) -> int:
        """Wait for the end of every rank; return 0, or the code of the first that failed, or 75 to start again.

        connection: a descriptor that ends when the first host is gone; what arrives there is thrown away. One that
            has ended already, such as /dev/null, tells nothing."""
        has_ended = bool(select.select([connection], [], [], 0)[0])
        listened, schedule = {self._wake, *([] if has_ended else [connection])}, list[tuple[float, int]]()
        while self.alive:
            wait = min(1.0, max(0.0, schedule[0][0] - time.monotonic())) if schedule else 1.0
            ready = select.select(listened, [], [], wait)[0]
            if connection in ready and not os.read(connection, 4096):
                listened.remove(connection)
                self._cut_at = time.monotonic()
                if not self._sent:
                    self._send(signal.SIGTERM)
            if self._wake in ready:
                for number in os.read(self._wake, 4096):
                    if number != signal.SIGCHLD and not self._is_late(number):
                        self._send(number)
            had_ended = bool(self.codes)
            self._reap()
            if self.codes and not had_ended:
                first = time.monotonic() + GRACE_SECONDS
                schedule = [(first, signal.SIGTERM), (first + KILL_SECONDS, signal.SIGKILL)]
            while schedule and schedule[0][0] <= time.monotonic():
                self._send(schedule.pop(0)[1])
        failed = [code for code in self.codes if code != signals.EXIT_CODE]
        return [*failed, *self.codes, 0][0]

    def _is_late(self, number: int) -> bool:
        """Whether a SIGTERM only repeats what the broken connection has said: a scheduler ends pdsh, and a moment later
        the launcher passes on what the scheduler told it. To the ranks a second one would mean "at once"."""
        return number == signal.SIGTERM and self._cut_at is not None and time.monotonic() - self._cut_at < LATE_SECONDS

    def _send(self, number: int) -> None:
        self._sent.add(number)
        for process in self.alive:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _reap(self) -> None:
        """Take leave of every rank that has ended; one that a signal ended could not say so itself."""
        for process in [process for process in self.alive if process.poll() is not None]:
            rank, status = self.alive.pop(process), process.returncode
            if status < 0 and -status not in self._sent:
                why = explain_signal(-status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
                print(f"rank {rank} on host {socket.gethostname()}: {why}", file=sys.stderr, flush=True)
            if status:
                self.codes.append(128 - status if status < 0 else status)


@contextlib.contextmanager
def _noted_pid(path: str) -> Iterator[None]:
    """Keep this process's id in a file of mode 600 that did not exist before."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(str(os.getpid()))
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
