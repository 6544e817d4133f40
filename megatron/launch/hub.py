"""What the guardians of all ranks agree on, decided beside rank 0: which failure was the first, and when a run hangs.

The order of an end: a failure arrives; a moment later, when further ones have come, the first cause is chosen; the
others say their line; the cause is shown; all leave. Nobody leaves before, because a launcher that sees one rank end
kills the rest, and would cut the report off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron.launch.failure import Failure, first_cause, from_hang, from_loss
from megatron.launch.hang import Seen, Stillness, missing, ranges, report, warning
from megatron.launch.link import Link, Message
from megatron.launch.stacks import Doing
from megatron.whereabouts import Position


@dataclass(frozen=True)
class Waits:
    """Seconds. echo: for the rank that caused an error which only tells that a rank is gone. more: for further failures
    behind one that is a cause. answers: for ranks that are asked what they do. words: for them to have said something.
    """

    echo: float = 2.0
    more: float = 0.3
    answers: float = 8.0
    words: float = 1.0


@dataclass
class Member:
    """A rank as the hub knows it, by its guardian."""

    rank: int
    host: str
    link: Link
    position: Position | None = None
    doing: Doing | None = None
    has_said: bool = False
    has_left: bool = False


class Hub:
    """Takes the guardians' messages and acts on them; `tick` is called several times a second.

    say: prints for all, on rank 0's stderr."""

    def __init__(
        self, world_size: int, hang_seconds: float | None, say: Callable[[str], None], waits: Waits | None = None
    ) -> None:
        self.members: dict[int, Member] = {}
        self.is_over = False
        self._exit_code = 1
        self._world_size, self._say, self._waits = world_size, say, waits or Waits()
        self._stillness = Stillness(hang_seconds)
        self._failures: list[Failure] = []
        self._next: Callable[[], None] | None = None
        self._deadline = 0.0
        self._is_done: Callable[[Member], bool] | None = None

    def join(self, rank: int, host: str, link: Link) -> None:
        """Take in a rank. Where the run is ending already it is told so."""
        self.members[rank] = Member(rank, host, link)
        if self.is_over:
            link.send({"leave": self._exit_code})

    def take(self, rank: int, message: Message) -> None:
        """Take one message of a rank."""
        member = self.members[rank]
        if "at" in message:
            member.position = Position.from_dict(message["at"])
        elif "failure" in message:
            self._note(Failure(**message["failure"]))
        elif "doing" in message:
            member.doing = Doing(**message["doing"])
        elif "said" in message:
            member.has_said = True
        elif "bye" in message:
            member.has_left = True

    def lost(self, rank: int) -> None:
        """Take note that a rank's guardian is gone; without a word that is a failure, of a machine most likely."""
        member = self.members[rank]
        if member.has_left or self.is_over:
            return
        member.has_left = True
        if not any(failure.rank == rank for failure in self._failures):
            steps = [
                one.position.step for one in self.members.values() if one.position and one.position.step is not None
            ]
            reached = max(steps, default=None)
            self._note(from_loss(rank, self._world_size, member.host, member.position, reached))

    def part(self) -> None:
        """Leave the others to themselves: rank 0 has ended well."""
        for member in self.members.values():
            member.link.send({"bye": True})

    def tick(self, now: float) -> None:
        """Do what is due. now: of time.monotonic."""
        if self._next is not None:
            waiting = [one for one in self._present() if self._is_done is None or not self._is_done(one)]
            if now >= self._deadline or not waiting:
                act, self._next, self._is_done = self._next, None, None
                act()
            return
        if self.is_over or self._failures or len(self.members) < self._world_size:
            return
        found = self._stillness.look({rank: one.position for rank, one in self.members.items()}, now)
        if found == "warning":
            self._say(f"\n{warning(self._seen(Doing()), self._stillness)}")
        elif found == "hang":
            self._tell({"look": True})
            self._then(self._end_hang, self._waits.answers, lambda one: one.doing is not None)

    def _present(self) -> list[Member]:
        return [member for member in self.members.values() if not member.has_left]

    def _tell(self, message: Message) -> None:
        for member in self._present():
            member.link.send(message)

    def _then(self, act: Callable[[], None], seconds: float, is_done: Callable[[Member], bool] | None = None) -> None:
        """Do `act` after some seconds, or as soon as all ranks that are there are done."""
        self._next, self._deadline, self._is_done = act, time.monotonic() + seconds, is_done or (lambda one: False)

    def _note(self, failure: Failure) -> None:
        if self.is_over:
            return
        self._failures.append(failure)
        wait = self._waits.echo if all(one.is_echo for one in self._failures) else self._waits.more
        if len(self._failures) == 1 or (not failure.is_echo and self._deadline > time.monotonic() + wait):
            self._then(self._choose, wait)

    def _choose(self) -> None:
        """Let one rank of each host say why its ranks end; then the cause is shown."""
        self.is_over = True
        cause = first_cause(self._failures)
        self._exit_code = cause.exit_code if cause.is_mistake else 1  # all ranks ask for another turn, where one does
        failed = {failure.rank for failure in self._failures if not failure.is_echo} | {cause.rank}
        hosts: dict[str, list[Member]] = {}
        for member in self._present():
            member.has_said = member.rank in failed
            if member.rank not in failed:
                hosts.setdefault(member.host, []).append(member)
        for host, members in hosts.items():
            ranks = ranges(member.rank for member in members)
            end = f"end{'s'[: len(members) == 1]}"
            line = f"{ranks} on host {host} {end} because {cause.brief}."
            for member in members:
                member.link.send({"say": line if member is members[0] else ""})
        self._then(lambda: self._show(cause), self._waits.words, lambda one: one.has_said)

    def _show(self, cause: Failure) -> None:
        shower = next((member for member in self._present() if member.rank == cause.rank), None)
        if shower is None or not shower.link.is_open:
            self._say(str(cause))
            self._leave()
            return
        for member in self._present():
            member.has_said = member is not shower
        shower.link.send({"say": f"\n{cause}"})
        self._then(self._leave, self._waits.words, lambda one: one.has_said)

    def _leave(self) -> None:
        self._tell({"leave": self._exit_code})

    def _seen(self, unasked: Doing) -> list[Seen]:
        """Return all ranks. unasked: what is said of one that has not told what it does."""
        return [
            Seen(one.rank, one.host, one.position, one.doing or (Doing("gone") if one.has_left else unasked))
            for one in self.members.values()
        ]

    def _end_hang(self) -> None:
        self.is_over = True
        seen = self._seen(Doing("silent: its machine does not answer"))
        first = min(missing(seen) or seen, key=lambda one: one.rank)
        self._say(f"\n{from_hang(report(seen, self._stillness.idle), first.rank, self._world_size, first.host)}")
        self._leave()
