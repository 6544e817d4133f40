"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import ExportError, Problem


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` when all went well, and vanishes otherwise.

    Raises ExportError where `out` already holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(Problem(f"output {out}", "It already exists.", "Choose a folder that does not exist yet."))
    temporary = out.with_name(f".converting_{out.name}_{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        fix = "Choose a folder on a disk with room that this user may write to."
        raise ExportError(Problem(f"output {out}", f"It cannot be written ({error}).", fix)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
