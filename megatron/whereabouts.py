"""Where this process is in the run: the step, the phase, the micro-batch, and since when.

    whereabouts.begin_step(197)                 # counted from 1
    whereabouts.enter(Phase.BACKWARD, 3)        # micro-batch 3; costs half a microsecond and never asks the device
    with whereabouts.inside(Phase.VALIDATION):  # what is entered within is "of the validation"
        ...

It is one small record, which the launcher places in memory that others can read even after this process was killed.
Only the thread that trains may write. Failures name it, and so does the report of a run that hangs.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from types import TracebackType
from typing import Any

# since (ns of the monotonic clock), changes, step, phase, the phase around it, micro-batch; -1: none
_RECORD = struct.Struct("<qqqiii4x")
RECORD_BYTES = _RECORD.size
_NONE = -1


class Phase(IntEnum):
    """What a rank does, in the order in which it comes to do it; `str` gives the words for a person."""

    START = 0
    MEETING = 1
    TOKENIZER = 2
    DATA_INDEX = 3
    CHECKPOINT_SEARCH = 4
    MODEL = 5
    ENGINE = 6
    LOAD = 7
    TRIAL = 8
    BATCH = 20
    TOKEN_COUNT = 21
    LOAD_MICRO_BATCH = 22
    RECEIVE_ACTIVATION = 23
    FORWARD = 24
    SEND_ACTIVATION = 25
    RECEIVE_GRADIENT = 26
    BACKWARD = 27
    SEND_GRADIENT = 28
    LOSS_SUM = 30
    GRADIENT_SUM = 31
    UPDATE = 32
    RESULT = 33
    LOGGING = 34
    EXAMINATION = 39
    CHECK = 40
    VALIDATION = 41
    SAVE = 42
    END = 50

    def __str__(self) -> str:
        return _WORDS.get(self, self.name.lower().replace("_", " "))


_WORDS = {
    Phase.START: "start-up",
    Phase.MEETING: "meeting of the ranks",
    Phase.DATA_INDEX: "building of the data index",
    Phase.CHECKPOINT_SEARCH: "search for a checkpoint",
    Phase.MODEL: "building of the model",
    Phase.ENGINE: "start of the engine",
    Phase.TRIAL: "trial of micro-batch sizes",
    Phase.TOKEN_COUNT: "count of tokens",
    Phase.LOAD_MICRO_BATCH: "load of a micro-batch",
    Phase.LOSS_SUM: "sum of the losses",
    Phase.GRADIENT_SUM: "sum of the gradients",
    Phase.RESULT: "wait for the result",
    Phase.EXAMINATION: "examination of a step",
    Phase.CHECK: "comparison of the replicas",
    Phase.END: "end of the run",
}


@dataclass(frozen=True)
class Position:
    """Where a rank was seen.

    step: the optimizer step under way, None before the first. outer: what `phase` is a part of, or None.
    micro_batch: counted from 0, None outside of one. since: when it came there, in seconds of `time.monotonic`, which
    is the same for all processes of a machine. changes: how often it has moved; equal means that it has not.
    """

    phase: Phase = Phase.START
    step: int | None = None
    micro_batch: int | None = None
    outer: Phase | None = None
    since: float = 0.0
    changes: int = 0

    def seconds(self, now: float | None = None) -> float:
        """Return how long the rank has been there. now: of `time.monotonic`."""
        return max(0.0, (time.monotonic() if now is None else now) - self.since)

    def wall_clock(self) -> float:
        """Return when it came there, in seconds since the epoch."""
        return time.time() - self.seconds()

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Return what is smaller for a rank that is behind."""
        step = -1 if self.step is None else self.step
        if self.micro_batch is None:
            return (step, self.phase if self.outer is None else self.outer, -1, self.phase)
        return (step, Phase.FORWARD if self.outer is None else self.outer, self.micro_batch, self.phase)

    def doing(self) -> str:
        """Return what it does without the step: `micro-batch 3, in backward`."""
        micro = "" if self.micro_batch is None else f"micro-batch {self.micro_batch}, "
        return f"{micro}in {self.phase}" + ("" if self.outer in (None, self.phase) else f" of the {self.outer}")

    def __str__(self) -> str:
        words = str(self.phase)
        if self.outer not in (None, self.phase):
            words += f" of the {self.outer}"
        if self.outer is not None and self.step is not None:
            words += " after"
        elif self.step is not None:
            words += " of"
        words += " before the first step" if self.step is None else f" step {self.step}"
        return words + ("" if self.micro_batch is None else f" micro-batch {self.micro_batch}")

    def as_dict(self, now: float | None = None) -> dict[str, Any]:
        """Return it for a machine with another clock: JSON values, with its age in the place of `since`."""
        return {
            "phase": int(self.phase),
            "step": self.step,
            "micro_batch": self.micro_batch,
            "outer": None if self.outer is None else int(self.outer),
            "age": self.seconds(now),
            "changes": self.changes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], now: float | None = None) -> Position:
        """Return the position that `as_dict` made, by this machine's clock."""
        outer = values["outer"]
        return cls(
            Phase(values["phase"]),
            values["step"],
            values["micro_batch"],
            None if outer is None else Phase(outer),
            (time.monotonic() if now is None else now) - values["age"],
            values["changes"],
        )


class _Here:
    """This process's record; `buffer` and `offset`: where it stands."""

    __slots__ = ("buffer", "changes", "offset", "outer", "phase", "step")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.buffer: bytearray | mmap = bytearray(RECORD_BYTES)
        self.offset, self.changes, self.step, self.outer = 0, 0, _NONE, _NONE
        self.phase = int(Phase.START)


_HERE = _Here()


def enter(phase: Phase, micro_batch: int = _NONE) -> None:
    """Say that this rank begins something else. micro_batch: counted from 0; -1 outside of one."""
    here = _HERE
    here.changes += 1
    here.phase = phase
    _RECORD.pack_into(
        here.buffer, here.offset, time.monotonic_ns(), here.changes, here.step, phase, here.outer, micro_batch
    )


def begin_step(iteration: int) -> None:
    """Say that the optimizer step `iteration` (counted from 1) begins, with its batch."""
    _HERE.step, _HERE.outer = iteration, _NONE
    enter(Phase.BATCH)


class inside:  # noqa: N801 - reads as a statement: with inside(Phase.SAVE)
    """All that is entered within is part of `phase`. After an error the position stays where that happened."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        self._before = _HERE.outer, _HERE.phase
        _HERE.outer = self._phase
        enter(self._phase)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            _HERE.outer, phase = self._before
            enter(Phase(phase))


def current() -> Position:
    """Return where this process is."""
    position = read(_HERE.buffer, _HERE.offset)
    return Position() if position is None else position


def read(buffer: bytearray | mmap, offset: int = 0) -> Position | None:
    """Return the position that the record at `offset` holds, or None where no process has written one."""
    for _ in range(3):  # another process may be writing it
        record = bytes(buffer[offset : offset + RECORD_BYTES])
        if record == bytes(buffer[offset : offset + RECORD_BYTES]):
            break
    since, changes, step, phase, outer, micro_batch = _RECORD.unpack(record)
    if changes == 0:
        return None
    return Position(
        Phase(phase),
        None if step == _NONE else step,
        None if micro_batch == _NONE else micro_batch,
        None if outer == _NONE else Phase(outer),
        since / 1e9,
        changes,
    )


def keep_in(buffer: bytearray | mmap, offset: int = 0) -> None:
    """Keep this process's record there from now on; children that it forks write to memory of their own again."""
    record = bytes(_HERE.buffer[_HERE.offset : _HERE.offset + RECORD_BYTES])
    buffer[offset : offset + RECORD_BYTES] = record
    _HERE.buffer, _HERE.offset = buffer, offset
    if not _FORKS:
        _FORKS.append(True)
        os.register_at_fork(after_in_child=_leave_shared_memory)


_FORKS: list[bool] = []


def _leave_shared_memory() -> None:
    _HERE.buffer, _HERE.offset = bytearray(_HERE.buffer[_HERE.offset : _HERE.offset + RECORD_BYTES]), 0


def reset() -> None:
    """Forget everything: this process stands at its start, in memory of its own."""
    _HERE.clear()
    enter(Phase.START)
