"""Libraries of kernels: built by a compiler when a run first needs one, and kept in a cache for all later runs.

A library lies in a folder of its own, whose name tells what it was built from. It is built elsewhere, and a rename puts
the folder in place, so it is there whole or not at all; of many ranks one builds, and the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOG = "build.log"

_SECONDS = 600


class BuildError(Exception):
    """What a compiler said when it failed, in one line."""


def cache_folder(kind: str) -> Path:
    """Return where the libraries of a kind, such as "cuda", are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deepy" / kind


def built_once(place: Path, is_whole: Callable[[Path], bool], build: Callable[[Path, Path], str]) -> None:
    """Build the folder `place` unless it is there, or another process on this machine has built it meanwhile.

    is_whole(place): whether it is there. build(finished, scratch): fills the folder `finished` and returns the text of
    its log; `scratch` is for temporary files. What it raises is raised, and nothing stays behind.
    """
    if is_whole(place):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_name(f"{place.name}.lock")):
        if not is_whole(place):
            _build(place, build)


def _build(place: Path, build: Callable[[Path, Path], str]) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", dir=place.parent) as name:
        finished = Path(name) / "finished"
        finished.mkdir()
        (finished / LOG).write_text(build(finished, Path(name)))
        shutil.rmtree(place, ignore_errors=True)  # a folder that is not whole
        finished.rename(place)


def run_compiler(words: Sequence[str], scratch: Path) -> str:
    """Return what a compiler says. Raises BuildError where it cannot be started, fails or takes too long."""
    environment = {**os.environ, "TMPDIR": str(scratch)}
    try:
        result = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=_SECONDS, env=environment, cwd=scratch
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{type(error).__name__}: {error}.") from error
    said = result.stdout + result.stderr
    if result.returncode:
        told = [line for line in said.splitlines() if line.strip() and not line.startswith("ptxas info")]
        raise BuildError(f"{Path(words[0]).name} ended with {result.returncode} and said: {' '.join(told[:12])}")
    return said


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within the block no other process, of any rank on this machine, holds the lock of this path."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
