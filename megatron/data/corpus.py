"""Which files a corpus consists of: JSON lines (plain, .zst or .gz), text files, and folders of them.

`find_inputs(["a.jsonl", "folder"])` lists them in a fixed order; `chunks.py` cuts them into pieces of work, and
`reading.py` turns a piece into texts.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron import logs
from megatron.errors import DataError, Problem

Kind = Literal["jsonl", "jsonl.zst", "jsonl.gz", "text"]
SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".jsonl.zst": "jsonl.zst", ".jsonl.gz": "jsonl.gz", ".txt": "text"}
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.xz", ".dat.zst", ".json.zst", ".parquet")

logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class InputFile:
    """One input file; `size` is its length on disk in bytes."""

    path: Path
    kind: Kind
    size: int


def find_inputs(inputs: Sequence[str], suffixes: Sequence[str] = ()) -> list[InputFile]:
    """The files behind `inputs` in a fixed order.

    inputs: files, folders (searched at any depth, sorted by path, hidden ones left out) and glob patterns.
    suffixes: further endings of text files, such as ".py".
    Raises DataError for an input that does not exist, that holds nothing, or whose format is unknown.
    """
    kinds: dict[str, Kind] = {**SUFFIXES, **{f".{suffix.lstrip('.')}": "text" for suffix in suffixes}}
    files: list[InputFile] = []
    for name in inputs:
        files.extend(_files_of(name, kinds))
    return files


def input_error(what: str, why: str, fix: str) -> DataError:
    """A DataError of one problem."""
    return DataError(Problem(what=what, why=why, fix=fix))


def _files_of(name: str, kinds: dict[str, Kind]) -> list[InputFile]:
    path = Path(name)
    if path.is_dir():
        inside = [found.relative_to(path) for found in path.rglob("*") if found.is_file()]
        visible = sorted(found for found in inside if not any(part.startswith(".") for part in found.parts))
        found = [_input_file(path / file, kind) for file in visible if (kind := _kind(file, kinds))]
        if not found:
            fix = "Add --suffix with the ending of your text files, such as --suffix .py"
            raise input_error(f"--input {name}", f"the folder holds no file ending in {' '.join(kinds)}.", fix)
        if len(found) < len(visible):
            others = [file.suffix or file.name for file in visible if not _kind(file, kinds)]
            logger.warning("%s: files left out, with other endings: %d (%s)", name, len(others), _first(others))
        return found
    if path.is_file():
        return [_input_file(path, _kind(path, kinds) or _refuse(path, kinds))]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise input_error(
            f"--input {name}", "there is no such file or folder.", f"Correct the path{_neighbours(path)}."
        )
    return [source for match in matches for source in _files_of(match, kinds)]


def _first(names: list[str], most: int = 8) -> str:
    names = sorted(set(names))
    return " ".join(names[:most]) + (" ..." if len(names) > most else "")


def _kind(path: Path, kinds: dict[str, Kind]) -> Kind | None:
    """The kind by the longest ending that fits."""
    endings = [ending for ending in kinds if path.name.endswith(ending)]
    return kinds[max(endings, key=len)] if endings else None


def _input_file(path: Path, kind: Kind) -> InputFile:
    return InputFile(path, kind, path.stat().st_size)


def _refuse(path: Path, kinds: dict[str, Kind]) -> Kind:
    if path.name.endswith(ARCHIVES):
        raise input_error(
            f"--input {path}", "is an archive, which is not read directly.", "Unpack it and name the folder."
        )
    fix = f"If it is text, add --suffix {path.suffix or path.name}"
    raise input_error(f"--input {path}", f"has an unknown ending; known are {' '.join(kinds)}.", fix)


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = sorted(found.name for found in path.parent.iterdir() if not found.name.startswith("."))
    return f"; {path.parent} holds {', '.join(names[:6])}" if names else ""
