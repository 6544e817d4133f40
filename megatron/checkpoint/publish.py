"""How a checkpoint comes to count: on a file system by a rename, in an object store by its manifest, written last.

place = place_of(root, iteration)
place.begin()                          # rank 0
place.folder.write_stream(place.rank_file(3), ...)   # each rank
place.publish(manifest)                # rank 0: from here on it counts
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Protocol

from megatron.checkpoint import steps
from megatron.checkpoint.layout import MANIFEST, REPLACED, WRITING, rank_file, step_name
from megatron.checkpoint.storage import Storage


class Place(Protocol):
    """Where one checkpoint is written. An error at any moment leaves the earlier ones, this iteration's included.

    folder: where its files are written. final: where it lies once it counts.
    """

    folder: Storage
    final: Storage

    def begin(self) -> str:
        """Prepare the folder, on rank 0; return what the others `follow`."""
        ...

    def follow(self, token: str) -> None:
        """Take over, on every rank, what rank 0 began."""
        ...

    def rank_file(self, rank: int) -> str:
        """Return the name of the file that a global rank writes."""
        ...

    def publish(self, manifest: bytes) -> None:
        """Let the checkpoint count, on rank 0, once all its other files are there."""
        ...

    def discard(self) -> None:
        """Remove what a failed save wrote, on rank 0, so that its room is free again; never raises."""
        ...


def place_of(root: Storage, iteration: int) -> Place:
    """Return where the checkpoint of an iteration is written."""
    return _RenamedPlace(root, iteration) if root.renames else _ObjectPlace(root, iteration)


class _RenamedPlace:
    """A temporary folder that is renamed."""

    def __init__(self, root: Storage, iteration: int) -> None:
        self._root = root
        self.final = root.at(step_name(iteration))
        self.folder = root.at(f"{WRITING}{self.final.name}")

    def begin(self) -> str:
        self.folder.make()
        return ""

    def follow(self, token: str) -> None:
        return

    def rank_file(self, rank: int) -> str:
        return rank_file(rank)

    def publish(self, manifest: bytes) -> None:
        """Rename the temporary folder; a checkpoint of the same iteration steps aside until that is done."""
        self.folder.write(MANIFEST, manifest)
        aside = f"{REPLACED}{self.final.name}"
        if self.final.exists():
            self._root.rename(self.final.name, aside)
        self._root.rename(self.folder.name, self.final.name)
        with contextlib.suppress(OSError):
            self._root.delete(aside)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.delete()


class _ObjectPlace:
    """The final names at once, beside a mark. Where this iteration is there already, its files are not touched: the new
    ones have other names, and the new manifest takes the place of the old in one request."""

    def __init__(self, root: Storage, iteration: int) -> None:
        self.final = self.folder = root.at(step_name(iteration))
        self._suffix = ""

    def begin(self) -> str:
        steps.mark(self.folder)
        return f".{secrets.token_hex(4)}" if self.folder.size(MANIFEST) is not None else ""

    def follow(self, token: str) -> None:
        self._suffix = token

    def rank_file(self, rank: int) -> str:
        name, dot, extension = rank_file(rank).partition(".")
        return f"{name}{self._suffix}{dot}{extension}"

    def publish(self, manifest: bytes) -> None:
        self.folder.write(MANIFEST, manifest)
        with contextlib.suppress(OSError):  # it counts; what is left to do, the next save does
            steps.sweep(self.folder)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            steps.sweep(self.folder)
