"""A small process beside each rank, where no launcher of ours watches over it: it tells how its rank is, and ends it.

It is forked from the rank before the rank uses a GPU, and shares the memory that holds the rank's position. So it
notices a rank that was killed, that is stopped, or that never gives Python a turn, and can report the end of one that
can no longer speak. All guardians are connected with that of rank 0, where a Hub decides. Signals are for the rank: a
guardian ignores those that ask a process to end, and ends with its rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import resource
import select
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

from megatron import whereabouts
from megatron.launch import flight, stacks
from megatron.launch.failure import from_exit, from_silence
from megatron.launch.hub import Hub, Waits
from megatron.launch.link import Link, Message
from megatron.launch.place import Place

_IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGPIPE", "SIGTSTP")
_SET_NAME = 15  # PR_SET_NAME of prctl(2)
_CONNECT_SECONDS = 20.0
_LEAVE_SECONDS = 2.0  # for a rank that was asked to leave, before it is killed
_FAILED_SECONDS = 10.0  # for a rank that failed and was told that this is known: to end with its own exit code
_MOST_BYTES = 1 << 12  # of a first message
_LINGER_SECONDS = 8.0  # for what is still to be said after the rank's end


@dataclass(frozen=True)
class Ward:
    """The rank that a guardian watches: its process, its position, the file in which it answers, the link to it, and a
    folder for both."""

    pid: int
    positions: mmap
    answers: int
    link: Link
    folder: Path


def run_guardian(
    place: Place, ward: Ward, listening: socket.socket | None, secret: str, hang_seconds: float | None, waits: Waits
) -> NoReturn:
    """In the forked child: watch until the rank has ended. listening, secret: of rank 0, which takes the others in."""
    try:
        keep = {ward.answers, ward.link.fileno()} | ({listening.fileno()} if listening else set())
        _settle(keep)
        hub = _HubServer(place, listening, secret, hang_seconds, waits) if listening is not None else None
        Guardian(place, ward, hub, hang_seconds).run()
    except BaseException as error:
        _say(f"[warning rank {place.rank}] its watch ended: {error!r}")
    finally:
        shutil.rmtree(ward.folder, ignore_errors=True)
        os._exit(0)


def _settle(keep: set[int]) -> None:
    """Become a process of its own: without the rank's signals, name and open files."""
    gc.disable()
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_NAME, b"deepy-watch", 0, 0, 0)
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) > 2 and int(entry) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(entry))


class Guardian:
    """Watches one rank. hub: beside rank 0, what all guardians are connected with; else None."""

    def __init__(self, place: Place, ward: Ward, hub: _HubServer | None, hang_seconds: float | None) -> None:
        self._place, self._ward, self._hub = place, ward, hub
        self._up: Link | None = None
        # The hub reads a message of each rank in this time, 1,000 in a second at most.
        self._interval = max(0.5 if hang_seconds is None else min(0.5, hang_seconds / 10), place.world_size / 1000)
        self._next_beat = 0.0
        self._peak = 0
        self._is_parting = self._has_failed = False
        self._ward_ended: float | None = None
        self._kill_at: float | None = None

    def run(self) -> None:
        """Serve until the rank has ended, and what is to be said of that is said."""
        exits = _exit_descriptor(self._ward.pid)
        while not self._is_over():
            wanted: list[Any] = [link for link in (self._ward.link, self._up) if link is not None and link.is_open]
            wanted += [] if self._hub is None else self._hub.readers()
            wanted += [exits] if exits is not None and self._ward_ended is None else []
            with contextlib.suppress(OSError, ValueError):
                select_many(wanted, self._interval)
            self._hear_ward()
            self._hear_hub()
            if self._hub is not None:
                self._hub.serve()
            self._look_after_ward()

    def _is_over(self) -> bool:
        if self._is_parting:
            if self._up is not None:
                self._up.send({"bye": True})
            if self._hub is not None:
                self._hub.part()
            return True
        if self._ward_ended is None:
            return False
        others = self._hub is not None and not self._hub.is_done() and self._up is not None
        speaks = self._up is not None and self._up.is_open
        return not (others or speaks) or time.monotonic() > self._ward_ended + _LINGER_SECONDS

    def _hear_ward(self) -> None:
        for message in self._ward.link.messages() if self._ward.link.is_open else []:
            if "connect" in message:
                self._connect(*message["connect"])
            elif "bye" in message:
                self._is_parting = True
            elif "failure" in message:
                self._has_failed = True
                if self._up is None or not self._up.is_open:
                    self._ward.link.send({"alone": True})
                else:
                    self._up.send(message)

    def _connect(self, address: str, port: int, secret: str) -> None:
        """Join the others; where that is impossible, say so, and watch for nobody else."""
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                if self._hub is not None:
                    self._up = self._hub.local()
                else:
                    self._up = Link(socket.create_connection((address, port), timeout=5))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    _say(
                        f"[warning rank {self._place.rank}] no connection to the watch of rank 0 at {address}:{port} "
                        f"({error}): this rank will not be told when another one dies or hangs."
                    )
                    return
                time.sleep(0.2)
        self._up.send({"hello": secret, "rank": self._place.rank, "host": self._place.host})

    def _hear_hub(self) -> None:
        if self._up is None:
            return
        for message in self._up.messages() if self._up.is_open else []:
            self._obey(message)
        if self._up is not None and not self._up.is_open and not self._is_parting and self._ward_ended is None:
            rank, host = self._place.rank, self._place.host
            if self._kill_at is None:
                position = whereabouts.read(self._ward.positions) or whereabouts.Position()
                at = "before its first step" if position.step is None else f"at step {position.step}"
                _say(f"rank {rank} on host {host} ends {at} because the machine or the watch of rank 0 is gone.")
            self._up = None
            self._dismiss()

    def _obey(self, message: Message) -> None:
        assert self._up is not None
        if "say" in message:
            _say(message["say"])
            self._up.send({"said": True})
        elif "look" in message:
            doing = stacks.ask(self._ward.pid, self._ward.answers)
            record = flight.ask(self._ward.folder, [self._place.rank]).get(self._place.rank, "")
            self._up.send({"doing": {**dataclasses.asdict(doing), "record": record}})
        elif "leave" in message:
            self._dismiss(int(message["leave"]))
        elif "bye" in message:
            self._up.close()
            self._up = None

    def _dismiss(self, exit_code: int = 1) -> None:
        """Ask the rank to end with an exit code; it is killed if it does not."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + (_FAILED_SECONDS if self._has_failed else _LEAVE_SECONDS)
            self._ward.link.send({"leave": exit_code})

    def _look_after_ward(self) -> None:
        if self._ward_ended is not None:
            return
        if os.getppid() != self._ward.pid or stacks.state_of(self._ward.pid) == "Z":
            self._ward_ended = time.monotonic()
            if not (self._has_failed or self._is_parting or self._kill_at):
                self._report_end()
            elif self._up is not None and self._kill_at:
                self._up.close()
            return
        now = time.monotonic()
        if self._kill_at is not None and now > self._kill_at:
            os.kill(self._ward.pid, signal.SIGKILL)
        if self._up is not None and now >= self._next_beat:
            self._next_beat = now + self._interval
            self._peak = max(self._peak, _peak_memory(self._ward.pid))
            position = whereabouts.read(self._ward.positions)
            if position is not None:
                self._up.send({"at": position.as_dict()})

    def _report_end(self) -> None:
        """Tell the others that the rank ended without a word."""
        place, position = self._place, whereabouts.read(self._ward.positions)
        status = _status_of(self._ward.pid)
        if self._up is None:
            return  # before the ranks have met, `check_in` names who is missing
        about = (self._peak, place.rank, place.world_size, place.host, position)
        failure = from_silence(*about) if status is None else from_exit(status, *about)
        self._up.send({"failure": dataclasses.asdict(failure)})


class _HubServer:
    """The hub and its connections, in the guardian of rank 0."""

    def __init__(
        self, place: Place, listening: socket.socket, secret: str, hang_seconds: float | None, waits: Waits
    ) -> None:
        self._listening, self._secret = listening, secret
        self._guests: list[Link] = []
        self._ranks: dict[Link, int] = {}
        self._hub = Hub(place.world_size, hang_seconds, _say, waits)
        with contextlib.suppress(OSError, ValueError):
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def readers(self) -> list[Any]:
        """Return what may have something to be read."""
        return [self._listening, *self._guests, *self._ranks]

    def local(self) -> Link:
        """Return a link to the hub in its own process."""
        one, other = socket.socketpair()
        self._guests.append(Link(one))
        return Link(other)

    def serve(self) -> None:
        """Take in who comes, hear everybody, and do what is due."""
        with contextlib.suppress(OSError):  # without descriptors left, say
            while select_many([self._listening], 0):
                self._guests.append(Link(self._listening.accept()[0]))
        for link in list(self._guests):
            self._greet(link)
        for link, rank in list(self._ranks.items()):
            for message in link.messages():
                self._hub.take(rank, message)
            if not link.is_open:
                del self._ranks[link]
                link.close()
                self._hub.lost(rank)
        self._hub.tick(time.monotonic())

    def _greet(self, link: Link) -> None:
        """Take in a guest that knows the secret; others are sent away."""
        for message in self._hear(link):
            if link in self._ranks:
                self._hub.take(self._ranks[link], message)
            elif message.get("hello") == self._secret:
                self._guests.remove(link)
                self._ranks[link] = int(message["rank"])
                self._hub.join(int(message["rank"]), str(message["host"]), link)
            else:
                link.close()
        if not link.is_open and link in self._guests:
            self._guests.remove(link)
            link.close()

    def _hear(self, link: Link) -> list[Message]:
        """Return what a guest says; one that is none of ours, a port scanner perhaps, is sent away."""
        with contextlib.suppress(ValueError):
            messages = link.messages()
            if link.pending < _MOST_BYTES and all(isinstance(message, dict) for message in messages):
                return messages
        link.close()
        return []

    def part(self) -> None:
        """Leave the others to themselves."""
        self._hub.part()

    def is_done(self) -> bool:
        """Whether nobody is left who needs it."""
        return not self._ranks


def _say(text: str) -> None:
    """Print where the rank prints its errors."""
    if text:
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


def select_many(readers: list[Any], seconds: float) -> list[int]:
    """Return the descriptors of `readers` that can be read within some seconds; there may be more than select takes."""
    poll = select.poll()
    for reader in readers:
        poll.register(reader, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(1000 * seconds)]


def _exit_descriptor(pid: int) -> int | None:
    """Return a descriptor that can be read once the process has ended; None where the kernel has none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _status_of(pid: int) -> int | None:
    """Return the exit code of a process that nobody has collected yet, or minus its signal; None where that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None
    except (OSError, ValueError, IndexError):
        return None


def _peak_memory(pid: int) -> int:
    """Return the largest resident memory of a process so far, in bytes; 0 where it is not known."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return 0
