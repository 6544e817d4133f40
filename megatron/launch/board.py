"""The notice board of the ranks on one machine: each rank's step, and the report of each that failed.

It is a temporary folder made by the launcher; a rank finds it by the environment variable DEEPY_BOARD. The
steps lie in one mapped file of int64, so that a step is known even of a rank that was killed.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import tempfile
from pathlib import Path

from megatron.launch.failure import Failure

VARIABLE = "DEEPY_BOARD"
_STEP = struct.Struct("<q")


class Board:
    """`folder` holds `steps` (an int64 per local rank, -1 before the first step) and `failure-<local rank>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "steps").open("r+b") as file:
            self._steps = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, ranks: int) -> Board:
        """Make the board of `ranks` local ranks; call `remove` in the end."""
        folder = Path(tempfile.mkdtemp(prefix="deepy-"))
        (folder / "steps").write_bytes(_STEP.pack(-1) * ranks)
        return cls(folder)

    def remove(self) -> None:
        """Delete the folder."""
        self._steps.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def set_step(self, local_rank: int, iteration: int) -> None:
        """Write down the step that a rank has begun."""
        _STEP.pack_into(self._steps, local_rank * _STEP.size, iteration)

    def step(self, local_rank: int) -> int | None:
        """Return the step a rank has begun, or None before the first."""
        value = _STEP.unpack_from(self._steps, local_rank * _STEP.size)[0]
        return None if value < 0 else int(value)

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

    def _report(self, local_rank: int) -> Path:
        return self.folder / f"failure-{local_rank}.json"
