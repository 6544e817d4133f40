"""One run at a time in a folder of checkpoints: two would overwrite and delete each other's.

The operating system holds the lock for as long as the process lives, so a killed run leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from typing import TextIO

from megatron.checkpoint import layout
from megatron.checkpoint.together import together
from megatron.errors import CheckpointError, Problem
from megatron.parallel.mesh import Mesh


class FolderLock:
    """Rank 0's claim on the folder `root`, which is made where it does not exist.

    Raises CheckpointError on every rank where another run holds it, or where the folder cannot be written. A file
    system without locks is no obstacle.
    """

    def __init__(self, root: Path, mesh: Mesh) -> None:
        self._root = root
        self._file: TextIO | None = None
        together(mesh, lambda: self._claim() if mesh.world.rank == 0 else None, self._explain)

    def release(self) -> None:
        """Let other runs have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _claim(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        file = open(self._root / layout.LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise CheckpointError(
                Problem(
                    what=f"save = {self._root}",
                    why=f"another run saves there now ({owner}), and each would overwrite the other's checkpoints.",
                    fix="Wait for it or stop it, or set save to another folder.",
                )
            ) from None
        except OSError:
            pass  # this file system knows no locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self._file = file

    def _explain(self, error: OSError) -> Problem:
        why = f"The folder cannot be written ({error.strerror}: {error.filename or self._root})."
        return Problem(f"save = {self._root}", why, "Give this user the right to write there, or set another save.")
