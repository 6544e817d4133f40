"""Temporary folders of a run, which are removed even where nobody was left to do it.

A folder belongs to whoever holds the lock of the file `.deepy-alive` in it: the process that made it, and its forks.
The kernel gives the lock back when all of them are gone, killed with -9 too; the next run on the machine then removes
the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _MARK = "deepy-scratch-", ".deepy-alive"
_YOUNG_SECONDS = 600.0  # between its making and its locking a folder is nobody's


def make() -> Path:
    """Return a new folder of this process and its forks; remove those of processes that are gone."""
    for folder in _abandoned(Path(tempfile.gettempdir())):
        shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    descriptor = os.open(folder / _MARK, os.O_RDWR | os.O_CREAT, 0o600)  # stays open until the process ends
    with contextlib.suppress(OSError):  # a file system without locks: the folder stays where all are killed
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder


def _abandoned(place: Path) -> Iterator[Path]:
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / _MARK, os.O_RDWR)
            try:
                found = os.fstat(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _YOUNG_SECONDS:
                    yield folder
            finally:
                os.close(descriptor)
