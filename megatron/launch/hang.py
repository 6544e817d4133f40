"""A run that makes no progress: when it is one, and what is said about who waits for whom.

All ranks of a run depend on each other, so it hangs when none of them has moved (`megatron.whereabouts`) for the time
that `hang_timeout_minutes` gives. What takes long by nature is given more: see `LONG`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.launch import flight
from megatron.launch.stacks import Doing
from megatron.whereabouts import Phase, Position

LONG = 2.0
"""How many times longer than elsewhere a rank may stay before its first step, in that step (kernels are compiled
there), in a save and in a load."""
_LONG_PHASES = (Phase.SAVE, Phase.LOAD, Phase.EXAMINATION, Phase.END)


@dataclass
class Stillness:
    """For how long no rank has moved. limit: seconds after which that is a hang; None: it never is.

    Time counts only as far as the ranks could have used it: while whoever looks was stopped, with the whole run, it
    does not."""

    limit: float | None
    idle: float = 0.0
    _changes: dict[int, int] = field(default_factory=dict)
    _first_steps: dict[int, int] = field(default_factory=dict)
    _looked: float | None = None
    _warned: bool = False

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return 1.0 if self.limit is None else min(1.0, self.limit / 10)

    def look(self, positions: Mapping[int, Position | None], now: float) -> str:
        """Return "hang" once no rank has moved for too long, "warning" once at half of that time, else "".

        positions: by rank. now: of time.monotonic."""
        passed = 0.0 if self._looked is None else min(now - self._looked, 5 * self.interval)
        self._looked = now
        changes = {rank: position.changes for rank, position in positions.items() if position is not None}
        if changes != self._changes or not changes:
            self._changes, self.idle, self._warned = changes, 0.0, False
            for rank, position in positions.items():
                if position is not None and position.step is not None:
                    self._first_steps.setdefault(rank, position.step)
            return ""
        self.idle += passed
        allowed = self._allowed(positions)
        if allowed is None or self.idle < allowed / 2:
            return ""
        if self.idle >= allowed:
            return "hang"
        warns, self._warned = not self._warned, True
        return "warning" if warns else ""

    def _allowed(self, positions: Mapping[int, Position | None]) -> float | None:
        if self.limit is None:
            return None
        is_long = any(self._is_long(rank, position) for rank, position in positions.items())
        return self.limit * (LONG if is_long else 1.0)

    def _is_long(self, rank: int, position: Position | None) -> bool:
        if position is None or position.step is None:
            return True
        return position.step == self._first_steps.get(rank) or bool(
            {position.phase, position.outer}.intersection(_LONG_PHASES)
        )


@dataclass(frozen=True)
class Seen:
    """A rank of a run that hangs: where it is, and what its process does."""

    rank: int
    host: str
    position: Position | None
    doing: Doing

    @property
    def place(self) -> str:
        """Where it is, in words."""
        where = str(self.position or "start-up before the first step")
        return f"{self.doing.waits_in}, in {where}" if self.doing.waits_in else where


def missing(ranks: Sequence[Seen]) -> list[Seen]:
    """Return the ranks that the others wait for; none where no rank can be told from the others.

    They are those whose process cannot run; else those that wait in no collective while others do; else those that are
    behind."""
    for found in (
        [rank for rank in ranks if rank.doing.is_stopped],
        [rank for rank in ranks if not rank.doing.waits_in],
        _behind(ranks),
    ):
        if found and len(found) < len(ranks):
            return found
    return list(ranks) if len(ranks) == 1 else []


def _behind(ranks: Sequence[Seen]) -> list[Seen]:
    if any(rank.doing.waits_in for rank in ranks):
        return []  # they all wait, so the one that is behind may be waiting for what another has left out
    orders = {rank.rank: (rank.position or Position()).order for rank in ranks}
    return [rank for rank in ranks if orders[rank.rank] == min(orders.values())]


def headline(ranks: Sequence[Seen], idle: float) -> str:
    """Return who waits in what, and who is missing, in one line."""
    absent = missing(ranks)
    waiting = [rank for rank in ranks if rank not in absent]
    words = [f"{name_ranks(group)} wait{'s'[: len(group) == 1]} in {place}" for place, group in _by_place(waiting)]
    for rank in absent:
        trouble = f" and is {rank.doing.trouble}" if rank.doing.trouble else ""
        seconds = idle if rank.position is None or not rank.position.since else rank.position.seconds()
        words.append(f"rank {rank.rank} (host {rank.host}) is in {rank.place}{trouble}, for {seconds:.0f} s")
    if not absent and len(words) > 1:
        words.append("they do not wait for the same thing, so one of them has left a collective out")
    return "; ".join(words)


def warning(ranks: Sequence[Seen], stillness: Stillness) -> str:
    """Return what is said at half of the time."""
    return (
        f"[warning] No rank has made progress for {stillness.idle:.0f} s: {headline(ranks, stillness.idle)}. The run "
        f"is ended after another {stillness.idle:.0f} s without any (hang_timeout_minutes)."
    )


def report(ranks: Sequence[Seen], idle: float) -> str:
    """Return what is said of a hang: who waits for whom, the stacks of the missing ranks, and of one that waits."""
    absent = missing(ranks)
    waiting = [group[0] for _, group in _by_place([rank for rank in ranks if rank not in absent])]
    shown = [*absent[:2], *waiting[: 1 if absent else 2]]
    stacks = "\n\n".join(_stack(rank, rank in absent) for rank in shown)
    records = [f"{rank.host}:{rank.doing.record}" for rank in ranks if rank.doing.record]
    if records:
        stacks += f"\n\nNCCL's last collectives ({flight.READER} reads them): {', '.join(records)}"
    return (
        f"The run hangs: no rank has made progress for {idle:.0f} s.\n{headline(ranks, idle)}.\n\n{stacks}\n\n"
        "All ranks were ended, exit code 1. Where this was honest work, such as a large index or a slow disk, set "
        "hang_timeout_minutes higher."
    )


def _stack(rank: Seen, is_absent: bool) -> str:
    which = "which the others wait for" if is_absent else "which waits"
    title = f"Rank {rank.rank} on host {rank.host}, {which} (the innermost call first):"
    return f"{title}\n{rank.doing.stack or '  no stack: the process is ' + (rank.doing.trouble or 'silent')}"


def _by_place(ranks: Sequence[Seen]) -> list[tuple[str, list[Seen]]]:
    groups: dict[str, list[Seen]] = {}
    for rank in ranks:
        groups.setdefault(rank.place, []).append(rank)
    return list(groups.items())


def name_ranks(ranks: Iterable[Seen]) -> str:
    """Return ranks briefly: `ranks 0-2, 5`."""
    return ranges(rank.rank for rank in ranks)


def ranges(ranks: Iterable[int]) -> str:
    """Return numbers of ranks briefly: {0, 1, 2, 5} -> `ranks 0-2, 5`."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and pieces[-1][-1] == rank - 1:
            pieces[-1].append(rank)
        else:
            pieces.append([rank])
    listed = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in pieces)
    return f"rank{'s'[: sum(map(len, pieces)) > 1]} {listed}"
