"""Saving while training goes on: a copy to host memory, then a thread of each rank that writes it.

    saver = BackgroundSaver(mesh, available_memory)
    saver.start(snapshot, write)        # blocks for the copy; `write(snapshot, mesh)` then runs in the thread
    saver.finished()                    # at each step: the save that is done since, if any
    saver.wait()                        # before the end

The threads agree over a process group of their own (gloo), so that what they say to each other never mixes with what
training says. There is one save at a time. A process that is killed leaves what a killed save in the foreground leaves.
"""

from __future__ import annotations

import datetime
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron import logs
from megatron.checkpoint.amounts import amount
from megatron.checkpoint.host_copy import HostCopies
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.together import together
from megatron.checkpoint.writer import Snapshot
from megatron.errors import CheckpointError, Problem
from megatron.parallel.mesh import Mesh

logger = logs.get_logger(__name__)

Write = Callable[[Snapshot, Mesh], Storage]

_PATIENCE = datetime.timedelta(hours=24)  # how long a rank that has written waits for the slowest; a dead one ends it
_KEPT_FREE = 0.05  # of the available memory, for everything else


@dataclass(frozen=True)
class Finished:
    """A save that is over. error: why there is no checkpoint, else None and `folder` says where it is.

    blocked, written: seconds for which training stood still, and until the checkpoint counted."""

    iteration: int
    folder: Storage | None
    error: CheckpointError | None
    blocked: float
    written: float


class _Job:
    """One save in its thread."""

    def __init__(self, snapshot: Snapshot, write: Write, mesh: Mesh, began: float) -> None:
        self.iteration = snapshot.iteration
        self._began, self._blocked, self._written = began, time.perf_counter() - began, 0.0
        self._folder: Storage | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(snapshot, write, mesh), name="save", daemon=True)
        self.thread.start()

    def _run(self, snapshot: Snapshot, write: Write, mesh: Mesh) -> None:
        try:
            self._folder = write(snapshot, mesh)
        except BaseException as error:
            self._error = error
        self._written = time.perf_counter() - self._began

    def result(self) -> Finished:
        """Return the outcome, or raise what was a bug of ours; the thread is over."""
        if self._error is not None and not isinstance(self._error, CheckpointError):
            raise self._error
        return Finished(self.iteration, self._folder, self._error, self._blocked, self._written)


class BackgroundSaver:
    """Writes one snapshot at a time in the background; every rank of the mesh must make the same calls.

    available: returns the bytes of host memory that processes of this machine may still take.
    """

    def __init__(self, mesh: Mesh, available: Callable[[], int]) -> None:
        self._mesh, self._available = mesh, available
        self._own = _with_own_group(mesh)
        self._copies = HostCopies(mesh.device)
        self._job: _Job | None = None
        self._warned = False

    def start(self, snapshot: Snapshot, write: Write, began: float | None = None) -> bool:
        """Copy the snapshot and begin to write it; the one before must be over.

        Returns False, on all ranks, where a machine has too little memory for the copies; rank 0 says which.
        began: when training stopped for this, by `time.perf_counter`.
        """
        assert self._job is None, "two saves at once"
        began = time.perf_counter() if began is None else began
        shortage = self._shortage(snapshot)
        if shortage:
            if not self._warned:
                logger.warning("async_save: this checkpoint is written while training waits. %s", shortage)
            self._warned = True
            return False
        try:
            together(self._mesh, lambda: self._copies.reserve(snapshot.pieces), _no_memory)
        except CheckpointError as error:
            logger.warning("async_save: this checkpoint is written while training waits. %s", error)
            return False
        pieces = self._copies.copy(snapshot.pieces)
        self._job = _Job(replace(snapshot, pieces=pieces), write, self._own, began)
        return True

    def _shortage(self, snapshot: Snapshot) -> str:
        """Return what is missing where the copies do not fit into the memory of a machine, alike on all ranks."""
        mine = (platform.node(), self._copies.missing(snapshot.pieces), self._available())
        ranks = together(self._mesh, lambda: mine, _no_memory)
        for host in sorted({host for host, _, _ in ranks}):
            needed = sum(missing for name, missing, _ in ranks if name == host)
            free = min(available for name, _, available in ranks if name == host)
            if needed and needed > free * (1 - _KEPT_FREE):
                return f"The copies need {amount(needed)} of host memory on {host}, where {amount(free)} are available."
        return ""

    @property
    def is_busy(self) -> bool:
        """Whether a save has been started whose outcome nobody has taken yet."""
        return self._job is not None

    def finished(self) -> Finished | None:
        """Return the outcome of a save that is over since the last call, without waiting."""
        return None if self._job is None or self._job.thread.is_alive() else self._take()

    def wait(self) -> Finished | None:
        """Wait for the save under way, and return its outcome; None where there is none."""
        if self._job is None:
            return None
        self._job.thread.join()
        return self._take()

    def _take(self) -> Finished:
        job, self._job = self._job, None
        assert job is not None
        return job.result()


def _with_own_group(mesh: Mesh) -> Mesh:
    """Return the mesh with a world of its own for the threads, over gloo."""
    if mesh.world.size == 1:
        return mesh
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return replace(mesh, world=replace(mesh.world, group=group))


def _no_memory(error: OSError) -> Problem:
    return Problem("async_save: true", f"{error.strerror or error}.", "Set async_save: false.")
