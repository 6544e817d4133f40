"""Temporary files that say which process writes them, so that those of a killed one can be told and removed."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is whole."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files of `paths` whose process is gone; those of another machine look so too.

    Raises OSError as the file system does.
    """
    for path in paths:
        for leftover in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
            process = leftover.name.rpartition("-")[2]
            if process.isdigit() and not _is_running(int(process)):
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Say whether there is such a process here; one of another user counts."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
