"""The notice board of the ranks on one machine: where each rank is, and the report of each that failed.

It is a temporary folder made by the launcher; a rank finds it by the environment variable DEEPY_BOARD. The
positions (`megatron.whereabouts`) lie in one mapped file, so that they are known even of a rank that was killed.
"""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

from megatron import whereabouts
from megatron.launch import scratch, stacks
from megatron.launch.failure import Failure
from megatron.launch.stacks import Doing
from megatron.whereabouts import RECORD_BYTES, Position

VARIABLE = "DEEPY_BOARD"


class Board:
    """`folder` holds `positions` (a record for each local rank), and for each rank `failure-<local rank>.json` if it
    failed, and `stack-<local rank>`, in which it answers what it is doing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "positions").open("r+b") as file:
            self._positions = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, ranks: int) -> Board:
        """Make the board of `ranks` local ranks; call `remove` in the end."""
        folder = scratch.make()
        (folder / "positions").write_bytes(bytes(RECORD_BYTES * ranks))
        for rank in range(ranks):
            (folder / f"stack-{rank}").touch()
        return cls(folder)

    def remove(self) -> None:
        """Delete the folder."""
        self._positions.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def hold_position(self, local_rank: int) -> None:
        """Keep this process's position here, as that of `local_rank`."""
        whereabouts.keep_in(self._positions, local_rank * RECORD_BYTES)

    def answer(self, local_rank: int) -> None:
        """Let this process answer here, as `local_rank`, what it is doing."""
        stacks.answer_in(os.open(self._stack(local_rank), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))

    def ask(self, local_rank: int, pid: int) -> Doing:
        """Return what a rank is doing. pid: its process."""
        with self._stack(local_rank).open("rb") as file:
            return stacks.ask(pid, file.fileno())

    def position(self, local_rank: int) -> Position | None:
        """Return where a rank is, or was when it ended; None where it has not come so far as to say it."""
        return whereabouts.read(self._positions, local_rank * RECORD_BYTES)

    def post(self, local_rank: int, failure: Failure) -> None:
        """Leave the report of a failed rank, whole or not at all."""
        path = self._report(local_rank)
        temporary = path.with_suffix(".part")
        temporary.write_text(failure.to_json())
        os.replace(temporary, path)

    def failure(self, local_rank: int) -> Failure | None:
        """Return the report that a rank left, if it left one."""
        path = self._report(local_rank)
        return Failure.from_json(path.read_text()) if path.exists() else None

    def _stack(self, local_rank: int) -> Path:
        return self.folder / f"stack-{local_rank}"

    def _report(self, local_rank: int) -> Path:
        return self.folder / f"failure-{local_rank}.json"
