"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import ExportError, Problem


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` when all went well, and vanishes otherwise.

    overwrite: an earlier model at `out` (a folder with config.json) is replaced, once the new one is whole.
    Raises ExportError where `out` already holds something else.
    """
    replaceable = overwrite and (out / "config.json").is_file()
    if out.exists() and not replaceable and (not out.is_dir() or any(out.iterdir())):
        fix = "Choose a folder that does not exist yet" + ("." if overwrite else ", or give --overwrite.")
        raise ExportError(Problem(f"output {out}", "It already exists.", fix))
    temporary = out.with_name(f".converting_{out.name}_{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, out)
    except OSError as error:
        fix = "Choose a folder on a disk with room that this user may write to."
        raise ExportError(Problem(f"output {out}", f"It cannot be written ({error}).", fix)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`; what was there steps aside first."""
    aside = out.with_name(f".replaced_{out.name}_{os.getpid()}")
    if out.exists():
        out.rename(aside)
    temporary.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
