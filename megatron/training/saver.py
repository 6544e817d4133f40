"""When and how a run saves: in the foreground or the background, to its folder and to a copy elsewhere.

saver = Saver(config, mesh)                     # the folder is this run's until `close`
saver.save(iteration, snapshot, last=False)
for iteration, folder in saver.written(): ...   # at each step: what has been saved since
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron import logs
from megatron.checkpoint.background import BackgroundSaver, Finished
from megatron.checkpoint.lock import FolderLock
from megatron.checkpoint.storage import Storage, storage_of
from megatron.checkpoint.writer import Snapshot, write_snapshot
from megatron.config.schema.config import Config
from megatron.errors import CheckpointError, Problem
from megatron.parallel.mesh import Mesh
from megatron.planning.machine import available_memory

logger = logs.get_logger(__name__)

_TOLD = 0.05  # seconds; a shorter wait for an earlier save is not worth a line


class Saver:
    """Saves to the folder or URL `save`, and then to `s3_path` where that is set; every rank makes the same calls.

    last_saved: the newest iteration that is saved, or being saved, with its copy.
    Raises CheckpointError where another run saves there, or where nothing can be written.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        settings = config.checkpoint
        assert settings.save is not None
        self._mesh, self._keep_last = mesh, settings.keep_last_n_checkpoints
        self._root = storage_of(settings.save, settings.s3_chunk_size)
        self._copy = storage_of(settings.s3_path, settings.s3_chunk_size) if settings.s3_path else None
        self._locks: list[FolderLock] = []
        self._background: BackgroundSaver | None = None
        self._written: list[tuple[int, Storage, float]] = []
        self.last_saved: int | None = None
        self._good: int | None = None  # the newest iteration that is known to be whole in `save`
        try:
            for root in (self._root, self._copy):
                if root is not None:
                    self._locks.append(FolderLock(root, mesh))
        except CheckpointError:
            self.close()
            raise
        self._background = BackgroundSaver(mesh, available_memory) if settings.async_save else None

    def goes_on_from(self, iteration: int) -> None:
        """Take note that the run has been restored from this checkpoint of its own."""
        self.last_saved = self._good = iteration

    def save(self, iteration: int, snapshot: Callable[[], Snapshot], last: bool) -> None:
        """Save what `snapshot()` returns, unless this iteration is saved; a save under way is waited for first.

        last: the run ends with it, so that nothing goes on meanwhile: it is written in the foreground.
        Raises CheckpointError where a save in the foreground fails.
        """
        began = time.perf_counter()
        self._settle()
        if self.last_saved == iteration:
            return
        taken = snapshot()
        if self._background is not None and not last and self._background.start(taken, self._write, began):
            self.last_saved = iteration
            return
        folder = self._write(taken, self._mesh)
        self.last_saved = iteration
        seconds = time.perf_counter() - began
        self._written.append((iteration, folder, seconds))
        self._tell("saved %s in %.1f s", folder, seconds)

    def _write(self, snapshot: Snapshot, mesh: Mesh) -> Storage:
        """Write to `save`, then to `s3_path`; in the background this is what the thread does."""
        folder = write_snapshot(snapshot, self._root, mesh, self._keep_last, self._good)
        self._good = snapshot.iteration
        if self._copy is not None:
            began = time.perf_counter()
            try:
                copy = write_snapshot(snapshot, self._copy, mesh, None)
            except CheckpointError as error:
                raise _not_copied(self._copy, folder, error) from error
            self._tell("copied it to %s in %.1f s", copy, time.perf_counter() - began)
        return folder

    def written(self) -> list[tuple[int, Storage, float]]:
        """Return (iteration, folder, seconds) of what has been saved since the last call; an error is told, not raised.

        Raises what was a bug of ours in the background."""
        if self._background is not None and (finished := self._background.finished()) is not None:
            self._note(finished)
        found, self._written = self._written, []
        return found

    def newest(self) -> int | None:
        """Return the newest iteration that is whole in `save`, once a save under way has ended; None where none is."""
        self._settle()
        return self._good

    def _settle(self) -> None:
        """Wait for the save under way, and say how long that took."""
        if self._background is None or not self._background.is_busy:
            return
        began = time.perf_counter()
        finished = self._background.wait()
        seconds = time.perf_counter() - began
        if finished is not None:
            if seconds > _TOLD:
                self._tell("waited %.1f s for the save of iteration %d", seconds, finished.iteration)
            self._note(finished)

    def _note(self, finished: Finished) -> None:
        """Tell the outcome of a save in the background."""
        if finished.folder is None:
            if self.last_saved == finished.iteration:
                self.last_saved = None
            logger.error("saving iteration %d failed in the background. %s", finished.iteration, finished.error)
            return
        self._written.append((finished.iteration, finished.folder, finished.written))
        self._tell(
            "saved %s in the background: blocked %.2f s, written in %.1f s",
            *(finished.folder, finished.blocked, finished.written),
        )

    def _tell(self, text: str, *values: object) -> None:
        if self._mesh.world.rank == 0:
            logger.info(text, *values)

    def close(self) -> None:
        """Wait for the save under way, and leave the folders to other runs."""
        try:
            self._settle()
        finally:
            for lock in self._locks:
                lock.release()
            self._locks = []


def _not_copied(copy: Storage, folder: Storage, error: CheckpointError) -> CheckpointError:
    """Return the error of a checkpoint that is saved, but not at `s3_path`."""
    why = "; ".join(problem.why for problem in error.problems)
    fix = "The checkpoint itself is whole; earlier copies are intact. See that the bucket exists and the store answers."
    return CheckpointError(
        Problem(f"s3_path = {copy}", f"{folder} is saved, but could not be copied there: {why}", fix)
    )
