"""Checkpoints in an object store: `s3://`, `gs://`, `memory://` and whatever else fsspec knows.

Credentials, profiles and regions are found as the store's own library finds them (for S3: AWS_ACCESS_KEY_ID,
~/.aws, an instance's role ...), another server by AWS_ENDPOINT_URL. An object appears whole when its upload is
completed, and an upload that is cut off leaves no object; there is no rename. What fails is tried again, a few times
and ever later; then it is an OSError, whatever the library raised.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from megatron import logs
from megatron.errors import CheckpointError, Problem

logger = logs.get_logger(__name__)

T = TypeVar("T")

PART_SIZE = 104857600
"""Bytes of one part of an upload: GPT-NeoX's default of `s3_chunk_size`."""

_WAITS = (1.0, 4.0)  # seconds before an operation that failed is tried again, each up to half as long again
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_S3_OPTIONS = {"config_kwargs": {"read_timeout": 30, "connect_timeout": 10, "retries": {"max_attempts": 0}}}
_S3_TRIES = 8  # of each request, each within 10 s, before the whole operation is tried again


class ObjectStorage:
    """All objects whose names begin with `url` and "/"; see `megatron.checkpoint.storage.Storage`.

    url: such as s3://bucket/run. part_size: bytes of one part of an upload.
    """

    renames = False

    def __init__(self, url: str, part_size: int = PART_SIZE) -> None:
        self._url = url.rstrip("/")
        self._part_size = part_size
        self._connection: tuple[int, Any, str] | None = None

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStorage) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    @property
    def name(self) -> str:
        """The last part of the folder's name."""
        return self._url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> ObjectStorage:
        """The folder that this one lies in; that of a bucket is the bucket itself."""
        above = self._url.rsplit("/", 1)[0]
        return self if above.endswith((":/", "/")) else ObjectStorage(above, self._part_size)

    def at(self, name: str) -> ObjectStorage:
        """Return the storage of a folder within, whether or not it holds anything."""
        return ObjectStorage(f"{self._url}/{name}", self._part_size)

    def local_path(self, name: str = "") -> Path | None:
        """Return None: objects lie on no disk of this machine."""
        return None

    @property
    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system and the root within it, which a forked process opens for itself."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), *_open(self._url))
        return self._connection[1:]

    def _path(self, name: str) -> str:
        return f"{self._opened[1]}/{name}" if name else self._opened[1]

    def _call(self, name: str, action: Callable[[Any, str], T]) -> T:
        """Return `action(file system, path)`, tried again where it fails in a way that may pass."""
        file_system, path = self._opened[0], self._path(name)
        file_system.invalidate_cache()
        return _persistently(lambda: action(file_system, path), f"{self._url}/{name}")

    def folders(self) -> list[str]:
        """Return the names of the folders directly within, in order."""
        return self._names("directory")

    def files(self) -> list[str]:
        """Return the names of the objects directly within, in order."""
        return self._names("file")

    def _names(self, kind: str) -> list[str]:
        try:
            entries = self._call("", lambda files, path: files.ls(path, detail=True))
        except FileNotFoundError:
            return []
        root = self._path("").strip("/")
        names = (entry["name"].strip("/") for entry in entries if entry["type"] == kind)
        return sorted(name.rsplit("/", 1)[-1] for name in names if name != root)

    def exists(self, name: str = "") -> bool:
        """Say whether an object, or anything within a folder, is there."""
        return bool(self._call(name, lambda files, path: files.exists(path)))

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, or None where there is none."""
        try:
            found = self._call(name, lambda files, path: files.info(path))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytearray:
        """Return `size` bytes at `offset`, fewer where the object ends before that; None reads to the end."""
        if size == 0:
            return bytearray()
        end = None if size is None else offset + size
        try:
            return bytearray(self._call(name, lambda files, path: files.cat_file(path, start=offset or None, end=end)))
        except OSError:
            there = self.size(name)
            if there is not None and there <= offset:
                return bytearray()  # a range beyond the end is an error to some stores
            raise

    def write(self, name: str, content: bytes) -> None:
        """Write a small object in one request: it appears whole or not at all."""
        self._call(name, lambda files, path: files.pipe_file(path, content))

    def write_stream(
        self, name: str, fill: Callable[[BinaryIO], T], check: Callable[[T], None] = lambda result: None
    ) -> T:
        """Upload what `fill(file)` writes, part by part, call `check(result)` when it is there, and return the result.

        `fill` is called again, from the beginning, where the upload failed. The object appears when all of it is there.
        """
        result = self._call(name, lambda files, path: self._upload(files, path, fill))
        check(result)
        return result

    def _upload(self, files: Any, path: str, fill: Callable[[BinaryIO], T]) -> T:
        upload = files.open(path, "wb", block_size=self._part_size, autocommit=False)
        try:
            result = fill(cast(BinaryIO, _Uploading(upload)))
            upload.close()
            upload.commit()
        except BaseException:
            _abort(upload)
            if isinstance(upload, io.BytesIO):  # memory:// shows a file from its first byte
                files.rm_file(path)
            raise
        return result

    def make(self) -> None:
        """Do nothing: a folder is the names of what lies in it."""

    def delete(self, name: str = "") -> None:
        """Delete an object, or all objects in a folder; nothing happens where there is none."""
        try:
            self._call(name, lambda files, path: files.rm(path, recursive=True))
        except FileNotFoundError:
            return

    def rename(self, old: str, new: str) -> None:
        """Raise OSError: no object store has a rename."""
        raise OSError(errno.ENOTSUP, "An object store has no rename", f"{self._url}/{old}")

    def sync(self) -> None:
        """Do nothing: an object that is there is durable."""

    def free(self) -> int | None:
        """Return None: a store is not expected to become full."""
        return None


class _Uploading(io.RawIOBase):
    """What `fill` writes to: passes on bytes, and never closes the upload, which would complete half of it."""

    def __init__(self, upload: Any) -> None:
        self._upload = upload

    def writable(self) -> bool:
        """Say that it is written to."""
        return True

    def write(self, data: Any) -> int:
        """Add bytes; a part is sent when one is full."""
        return int(self._upload.write(data))


def _abort(upload: Any) -> None:
    """Give an upload up, with the parts that the store holds of it; what cannot be reached now, its rules clean."""
    try:
        upload.discard()
    except Exception as error:
        logger.debug("an upload that failed could not be given up: %s", error)
    with contextlib.suppress(AttributeError):
        upload.closed = True  # else the file's destructor would complete what there is


def _persistently(action: Callable[[], T], name: str) -> T:
    """Return what `action` returns, after a few tries if need be; raise OSError where all failed."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except _FINAL:
            raise
        except Exception as error:
            if not _is_of_the_store(error) or getattr(error, "errno", None) == errno.EINVAL:
                raise
            if wait is None or type(error).__name__ in ("NoCredentialsError", "ParamValidationError"):
                raise _as_os_error(error, name) from error
            logger.warning("%s: %s; trying again in %.0f s", name, _text(error), wait)
            time.sleep(wait * random.uniform(1.0, 1.5))
    raise AssertionError("unreachable")


def _is_of_the_store(error: Exception) -> bool:
    """Say whether a library raised an error, and not the code that made the bytes."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] not in ("builtins", "megatron", "torch")


def _as_os_error(error: Exception, name: str) -> OSError:
    """Return the error of a store's library as one of a file system."""
    if type(error).__name__ == "NoCredentialsError":
        return PermissionError(errno.EACCES, "no credentials were found (environment, ~/.aws, a role ...)", name)
    return OSError(errno.EIO, _text(error), name)


def _text(error: Exception) -> str:
    """Return what an error says, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def _open(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Of what it lists nothing is kept: others write too."""
    protocol = url.split("://", 1)[0]
    is_s3 = protocol in ("s3", "s3a")
    options: dict[str, Any] = {"use_listings_cache": False, **(_S3_OPTIONS if is_s3 else {})}
    try:
        fsspec = importlib.import_module("fsspec")
        file_system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        need = "pip install -r requirements/s3.txt" if is_s3 else f"Install it: pip install {_library(protocol)}"
        raise CheckpointError(Problem(url, f"the library for {protocol}:// is missing ({error}).", need)) from error
    except ValueError as error:
        fix = "Write a folder, or a URL such as s3://bucket/run."
        raise CheckpointError(Problem(url, f"no storage of this kind is known ({error}).", fix)) from error
    if is_s3:
        file_system.retries = _S3_TRIES
    return file_system, path.rstrip("/")


def _library(protocol: str) -> str:
    """Return the package that fsspec needs for a protocol."""
    return {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(
        protocol, f"what fsspec names for {protocol}"
    )
