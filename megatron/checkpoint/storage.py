"""Where checkpoints lie: a folder, or an object store by its URL, behind one protocol.

    root = storage_of("checkpoints/pile")     # or "s3://bucket/pile", "gs://bucket/pile", "memory://pile"
    folder = root.at("global_step100")
    folder.read("rank_00000.safetensors", offset=4096, size=1024)

A `Storage` is one folder; names are relative to it, with "/" between folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from megatron.checkpoint.local_storage import LocalStorage
from megatron.checkpoint.object_storage import PART_SIZE, ObjectStorage
from megatron.errors import CheckpointError, Problem

T = TypeVar("T")


class Storage(Protocol):
    """One folder of files or objects. All methods raise OSError where the file system or the store fails.

    Files are never changed once written; other processes and machines may read and write beside this one.
    """

    @property
    def renames(self) -> bool:
        """Whether `rename` exists, so that a folder can appear under its name at once."""
        ...

    @property
    def name(self) -> str:
        """The last part of the folder's name."""
        ...

    @property
    def parent(self) -> Storage:
        """The folder that this one lies in."""
        ...

    def at(self, name: str) -> Storage:
        """Return the storage of a folder within, whether or not it exists."""
        ...

    def local_path(self, name: str = "") -> Path | None:
        """Return where a file lies on this machine, for what needs a path; None where it lies elsewhere."""
        ...

    def folders(self) -> list[str]:
        """Return the names of the folders directly within, in order; [] where this folder does not exist."""
        ...

    def files(self) -> list[str]:
        """Return the names of the files directly within, in order; [] where this folder does not exist."""
        ...

    def exists(self, name: str = "") -> bool:
        """Say whether a file or folder is there."""
        ...

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None where there is none."""
        ...

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytearray:
        """Return `size` bytes at `offset`, fewer where the file ends before that; None reads to the end."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, replacing what was there: whole or not at all, and durable."""
        ...

    def write_stream(
        self, name: str, fill: Callable[[BinaryIO], T], check: Callable[[T], None] = lambda result: None
    ) -> T:
        """Write a new, durable file by `fill(file)`, and return what `fill` returned; nothing is left where it failed.

        `fill` may be called again, from the beginning, where a store failed. `check(result)` is called once the file
        can be read, and may raise; on a file system it runs while the file is synced.
        """
        ...

    def make(self) -> None:
        """Make the folder, where folders are something to be made."""
        ...

    def delete(self, name: str = "") -> None:
        """Delete a file, or a folder with all that is in it; nothing happens where there is none."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder within another name, at once and durably; only where `renames`."""
        ...

    def sync(self) -> None:
        """Make the names within the folder durable."""
        ...

    def free(self) -> int | None:
        """Return the bytes that may still be written, or None where nobody knows."""
        ...


def is_url(root: str) -> bool:
    """Say whether `root` names an object store; "file://" is a folder."""
    return "://" in root and not root.startswith(("file://", "local://"))


def storage_of(root: str | Path | Storage, part_size: int = PART_SIZE) -> Storage:
    """Return the storage of a folder ("~" is the home) or URL, or `root` itself where it is one already.

    part_size: bytes of one part of an upload to an object store.
    Raises CheckpointError where a URL lacks a slash, and, when it is first used, where an object store's library is
    missing.
    """
    if isinstance(root, str) and is_url(root):
        return ObjectStorage(root, part_size)
    if isinstance(root, str | Path):
        name = str(root).removeprefix("file://").removeprefix("local://")
        if re.match(r"(s3a?|gcs|gs|az|abfs|file|memory):/", name):
            why = "it is neither a folder nor a URL."
            raise CheckpointError(Problem(str(root), why, f"Write {name.replace(':/', '://', 1)}"))
        return LocalStorage(Path(name).expanduser())
    return root
