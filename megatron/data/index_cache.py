"""Indices on disk, built by one process and mapped by all.

The one idea: a folder's name is a sha256 over everything its content depends on (document sizes, seq_length, seed ...),
so a stale index cannot be found, and there is nothing to invalidate. A folder appears by one rename after its files
are on disk, so it is whole or absent. Small indices are not worth a file: every process builds its own.

    arrays = IndexCache(folder).get({"sizes": digest, "seed": 1234}, num_entries, build)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron import logs

Arrays = Mapping[str, NDArray[Any]]
SMALL_INDEX = 1 << 20
"""Entries (documents and samples) below which an index stays in memory; it takes about 0.1 s to build."""

FORMAT = 1
logger = logs.get_logger(__name__)


def _no_barrier() -> None:
    """A single process waits for nobody."""


@dataclass(frozen=True)
class IndexCache:
    """Where indices are kept and who builds them.

    folder: None keeps every index in memory.
    is_builder: whether this process builds what is missing; one per file system.
    barrier: called by every process once per index that is kept on disk, after the builder is done.
    asked: the facts of all indices that were asked for, in order.
    """

    folder: Path | None = None
    is_builder: bool = True
    barrier: Callable[[], None] = _no_barrier
    asked: list[Mapping[str, object]] = field(default_factory=list)

    def get(self, facts: Mapping[str, object], num_entries: int, build: Callable[[], Arrays]) -> Arrays:
        """Return the arrays that `build` makes; read-only maps of files where the index is large.

        facts: everything the arrays depend on, as JSON values. num_entries: about as many as the arrays have.
        Where the folder cannot be written, every process builds the index in its own memory, with a warning.
        """
        self.asked.append(facts)
        if self.folder is None or num_entries < SMALL_INDEX:
            return build()
        text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, indent=1)
        folder = self.folder / _hash(text)
        built = None
        if self.is_builder and not folder.is_dir():
            begin = time.perf_counter()
            built = build()
            logger.info("Built a data index of %s entries in %.1f s.", f"{num_entries:,}", time.perf_counter() - begin)
            _store(folder, built, text)
        self.barrier()
        if folder.is_dir():
            return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        if not self.is_builder:
            logger.warning("There is no %s to map; this process builds the index in its own memory.", folder)
        return build() if built is None else built

    def order(self) -> str:
        """A hash of all that the order of the samples depends on, for the indices that were asked for."""
        return _hash(json.dumps({"format": FORMAT, "indices": self.asked}, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _store(folder: Path, arrays: Arrays, facts: str) -> None:
    """Write the arrays beside `facts`, sync them and rename the folder; another builder may have been faster."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / "facts.json").write_text(facts)
        for name, array in arrays.items():
            _write_array(temporary / f"{name}.npy", array)
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            logger.warning(
                "The data index cannot be kept in %s (%s), so every process builds its own. Set data_index_dir to a "
                "folder that all processes can read and the first can write.",
                folder.parent,
                error.strerror or error,
            )


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
