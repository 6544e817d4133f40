"""Checkpoints in a folder of a file system, local or shared: what is written is synced, and takes its place whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class LocalStorage:
    """The folder `root`; see `megatron.checkpoint.storage.Storage` for what each method promises."""

    root: Path

    renames = True

    def __str__(self) -> str:
        return str(self.root)

    @property
    def name(self) -> str:
        """The last part of the folder's name."""
        return self.root.name

    @property
    def parent(self) -> LocalStorage:
        """The folder that this one lies in."""
        return LocalStorage(self.root.parent)

    def at(self, name: str) -> LocalStorage:
        """Return the storage of a folder within, whether or not it exists."""
        return LocalStorage(self.root / name)

    def local_path(self, name: str = "") -> Path:
        """Return where a file or folder lies on this machine."""
        return self.root / name

    def folders(self) -> list[str]:
        """Return the names of the folders directly within, in order."""
        return sorted(entry.name for entry in self._entries() if entry.is_dir())

    def files(self) -> list[str]:
        """Return the names of the files directly within, in order."""
        return sorted(entry.name for entry in self._entries() if not entry.is_dir())

    def _entries(self) -> list[Path]:
        return list(self.root.iterdir()) if self.root.is_dir() else []

    def exists(self, name: str = "") -> bool:
        """Say whether a file or folder is there."""
        return (self.root / name).exists()

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None where there is none."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytearray:
        """Return `size` bytes at `offset`, fewer where the file ends before that; None reads to the end."""
        with open(self.root / name, "rb") as file:
            if size is None:
                size = max(0, os.fstat(file.fileno()).st_size - offset)
            values = bytearray(size)
            file.seek(offset)
            filled = file.readinto(values)
        return values if filled == size else values[:filled]

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, in its place whole or not at all, and synced."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)

    def write_stream(
        self, name: str, fill: Callable[[BinaryIO], T], check: Callable[[T], None] = lambda result: None
    ) -> T:
        """Write a new file with `fill(file)`, sync it while `check(result)` reads it back, and return the result."""
        path = self.root / name
        file = open(path, "xb")  # noqa: SIM115
        try:
            with file, ThreadPoolExecutor(1) as syncer:
                result = fill(file)
                file.flush()
                synced = syncer.submit(os.fsync, file.fileno())
                check(result)
                synced.result()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return result

    def make(self) -> None:
        """Make the folder, with those above it, where it does not exist."""
        self.root.mkdir(parents=True, exist_ok=True)

    def delete(self, name: str = "") -> None:
        """Delete a file, or a folder with all that is in it; nothing happens where there is none."""
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder within another name, at once and durably."""
        os.rename(self.root / old, self.root / new)
        self.sync()

    def sync(self) -> None:
        """Make the names within the folder durable."""
        _sync_folder(self.root)

    def free(self) -> int | None:
        """Return the bytes that may still be written."""
        return shutil.disk_usage(self.root).free


def _sync_folder(folder: Path) -> None:
    """Make the names within a folder durable, where its file system can: some (SMB, FUSE) refuse to."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)
