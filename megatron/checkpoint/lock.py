"""One run at a time in a folder of checkpoints: two would overwrite and delete each other's.

On a file system the operating system holds the lock for as long as the process lives, so a killed run leaves nothing to
clean up. An object store has no locks: there an object names the owner, who writes it anew every 15 seconds. A run that
finds one waits until it is renewed, and then stops, or until that has not happened for 60 seconds, and then takes it;
that of a process which was on this machine and is no more it takes at once.
Two runs that begin within the same second are told apart by reading it again; that is a courtesy, and no guarantee.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron import logs
from megatron.checkpoint import layout
from megatron.checkpoint.storage import Storage, storage_of
from megatron.checkpoint.together import together
from megatron.errors import CheckpointError, Problem
from megatron.parallel.mesh import Mesh

logger = logs.get_logger(__name__)

_BEAT, _LOST = 15.0, 60.0  # seconds between signs of life; until a lock without one counts as left
_LONG_AGO = 86400.0  # seconds after which it surely is, wrong clocks and time zones granted
_SETTLE = 1.0  # seconds after which a claim is read again


class FolderLock:
    """Rank 0's claim on a folder or URL, which is made where it does not exist.

    Raises CheckpointError on every rank where another run holds it, or where the folder cannot be written. A file
    system without locks is no obstacle.
    """

    def __init__(self, root: Storage | os.PathLike[str] | str, mesh: Mesh) -> None:
        self._root = storage_of(os.fspath(root) if isinstance(root, os.PathLike) else root)
        self._held: _Held | None = None
        together(mesh, lambda: self._claim() if mesh.world.rank == 0 else None, self._explain)

    def release(self) -> None:
        """Let other runs have the folder."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def _claim(self) -> None:
        self._root.make()
        self._held = _ObjectLock(self._root) if self._root.local_path() is None else _FileLock(self._root)

    def _explain(self, error: OSError) -> Problem:
        why = f"The folder cannot be written ({error.strerror}: {error.filename or self._root})."
        fix = "Give this user the right to write there, or set another save."
        if self._root.local_path() is None:
            fix = "See that the bucket exists and that this user may write to it, or set another save."
        return Problem(f"save = {self._root}", why, fix)


class _Held(Protocol):
    """A lock that this process holds."""

    def release(self) -> None: ...


class _FileLock:
    """A lock of the operating system."""

    def __init__(self, root: Storage) -> None:
        path = root.local_path(layout.LOCK)
        assert path is not None
        self._file: TextIO = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise _taken(root, owner) from None
        except OSError:
            pass  # this file system knows no locks
        self._file.truncate(0)
        self._file.write(f"{_me()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class _ObjectLock:
    """An object that its owner writes anew as long as it lives."""

    def __init__(self, root: Storage) -> None:
        self._root, self._token, self._ended = root, secrets.token_hex(8), threading.Event()
        self._wait_for_others()
        self._beat(0)
        time.sleep(_SETTLE)
        found = self._read()
        if found.get("token") != self._token:
            raise _taken(root, str(found.get("owner")))
        threading.Thread(target=self._keep, name="lock of the checkpoints", daemon=True).start()

    def _wait_for_others(self) -> None:
        """Return once no other run holds the lock; raise where one shows that it lives."""
        first = self._read()
        if not first or time.time() - float(first.get("time", 0)) > _LONG_AGO or _has_ended(first.get("process")):
            return
        logger.info("%s is locked by %s; waiting up to %.0f s for a sign of life", self._root, first["owner"], _LOST)
        deadline = time.monotonic() + _LOST
        while time.monotonic() < deadline:
            time.sleep(min(1.0, _LOST / 10))
            now = self._read()
            if not now:
                return
            if now != first:
                raise _taken(self._root, str(now["owner"]))
        logger.info("%s has given no sign of life: its lock is taken over", first["owner"])

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._root.read(layout.LOCK))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) and "owner" in found else {}

    def _beat(self, number: int) -> None:
        process = _process(os.getpid())
        content = {"owner": _me(), "token": self._token, "time": time.time(), "beat": number, "process": process}
        self._root.write(layout.LOCK, json.dumps(content).encode())

    def _keep(self) -> None:
        """Write the object anew until the lock is released; say it where another run has taken it meanwhile."""
        number = 0
        while not self._ended.wait(_BEAT):
            number += 1
            try:
                found = self._read()
                if found.get("token", self._token) != self._token:
                    logger.error("%s now saves to %s too: stop one of the two runs", found["owner"], self._root)
                self._beat(number)
            except OSError as error:
                logger.warning("the lock of %s could not be renewed: %s", self._root, error)

    def release(self) -> None:
        self._ended.set()
        try:
            if self._read().get("token") == self._token:
                self._root.delete(layout.LOCK)
        except OSError as error:
            logger.warning("the lock of %s could not be released: %s", self._root, error)


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _process(pid: int) -> list[str | int] | None:
    """Return what names a process of this machine once and for all: boot, name space of process ids, id and when it
    began; None where it is not there, or the system does not say."""
    try:
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid"), pid, began]
    except (OSError, IndexError):
        return None


def _has_ended(process: object) -> bool:
    """Say whether a process that `_process` named was one of this machine, and is no more."""
    here = _process(os.getpid())
    if here is None or not isinstance(process, list) or len(process) != 4 or process[:2] != here[:2]:
        return False
    return _process(int(process[2])) != process


def _taken(root: Storage, owner: str) -> CheckpointError:
    return CheckpointError(
        Problem(
            what=f"save = {root}",
            why=f"another run saves there now ({owner}), and each would overwrite the other's checkpoints.",
            fix="Wait for it or stop it, or set save to another folder.",
        )
    )
