"""What a run keeps on disk of itself: where it resumes, and when and how it saves.

keeper = Keeper(config, mesh, tokenizer)  # finds the checkpoint first: nothing is built for a wrong path
progress = keeper.restore(engine, shapes)
keeper.save_if_due(engine, progress)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from megatron.checkpoint.compatible import require_same_model, require_tokenizer
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.model import WORD_EMBEDDINGS
from megatron.checkpoint.retention import save_iterations
from megatron.checkpoint.save import take_snapshot
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.together import together
from megatron.checkpoint.topology import say_resharding, topology_of
from megatron.checkpoint.writer import Snapshot
from megatron.config.schema.config import Config
from megatron.data.gpt import SampleReader
from megatron.engine.base import Engine
from megatron.errors import CheckpointError, Problem
from megatron.logs import get_logger
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.base import Tokenizer
from megatron.training.progress import Progress
from megatron.training.restore import load_or_earlier, tell_changes
from megatron.training.same_samples import NEXT_SAMPLES, record_next, require_same_samples
from megatron.training.same_schedule import with_agreed_schedule
from megatron.training.saver import Saver
from megatron.training.source import Opened, Source, open_or_earlier, open_source
from megatron.whereabouts import Phase, inside

logger = get_logger(__name__)


class Keeper:
    """Restores a run's state when it begins and saves it when that is due; `save` is its own until it is closed.

    extra: what each checkpoint records besides: "train_order" (see `DataSets`), "config_files" ({name: text}).
    samples: the training samples, of which checkpoints record those that come next; None records nothing.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        tokenizer: Tokenizer,
        extra: Mapping[str, Any] | None = None,
        samples: SampleReader | None = None,
    ) -> None:
        self._config = config
        self._samples = samples
        self._mesh = mesh
        self._tokenizer = tokenizer
        self._extra = dict(extra or {})
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._due = frozenset(save_iterations(config.checkpoint, config.training.train_iters or 0))
        self._saver = Saver(config, mesh) if config.checkpoint.save else None
        try:
            self._opened = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Opened | None:
        """Find the checkpoint that the run begins from, and take from it what the config leaves to it."""
        config = self._config
        opened = open_source(config.checkpoint, self._mesh)
        if opened is not None:
            require_same_model(opened.reader, config)
            require_tokenizer(opened.reader, self._tokenizer.name, self._tokenizer.fingerprint())
            if not self._finetunes(opened.source):
                self._config = with_agreed_schedule(config, opened.reader)
        return opened

    @property
    def config(self) -> Config:
        """The config of the run: the given one, with the checkpoint's schedule where that is asked for."""
        return self._config

    @property
    def is_fresh(self) -> bool:
        """Whether the run begins from initial weights, so that drawing them is not in vain."""
        return self._opened is None

    @property
    def described(self) -> str:
        """The checkpoint that the run begins from, in words."""
        return "no checkpoint" if self._opened is None else str(self._opened.source.folder)

    def vocabulary(self, planned: int, tensor_parallel_size: int) -> int:
        """Return the rows of the word embedding: the checkpoint's where there is one, so that no layout changes them.

        planned: the rows that a new model would have, padding included.
        Raises CheckpointError where the checkpoint's rows cannot be shared by the tensor parallel ranks.
        """
        reader = self._opened.reader if self._opened else None
        rows = reader.shapes.get(WORD_EMBEDDINGS, (planned,))[0] if reader else planned
        if reader is None or rows == planned or rows < self._tokenizer.vocab_size:
            return planned  # where it is too small, `restore` refuses it by name
        if rows % tensor_parallel_size:
            raise CheckpointError(
                Problem(
                    f"model_parallel_size = {tensor_parallel_size}",
                    f"The checkpoint's vocabulary of {rows:,} rows cannot be divided by it.",
                    f"Set model_parallel_size to a divisor of {rows:,}.",
                    str(reader.folder),
                )
            )
        logger.info(
            "the vocabulary keeps the checkpoint's %s rows; a new model would have %s", f"{rows:,}", f"{planned:,}"
        )
        return rows

    def restore(self, engine: Engine, shapes: dict[str, tuple[int, ...]]) -> Progress:
        """Fill the engine from the checkpoint, if there is one, and return how far that run had come.

        shapes: canonical name -> full shape of the weights of this run's model.
        Under `finetune` only the weights load, unless the run goes on from a checkpoint of its own.
        Raises CheckpointError on every rank where it cannot.
        """
        self._shapes = dict(shapes)
        if self._opened is None:
            logger.info("starting from initial weights (seed %d)", self._config.numerics.seed)
            return Progress()
        self._opened = load_or_earlier(engine, shapes, self._opened, self._config, self._mesh)
        reader, source = self._opened.reader, self._opened.source
        self._opened = None
        finetune = self._finetunes(source)
        progress = Progress() if finetune else Progress.from_dict(reader.manifest.progress)
        logger.info(
            "loaded %s: %s, masters equal to the weights on every rank; continuing after iteration %d",
            reader.folder,
            "weights only" if finetune or self._config.checkpoint.no_load_optim else "optimizer state included",
            progress.iteration,
        )
        before, now = reader.manifest.topology, topology_of(self._mesh, self._config)
        logger.info("%s", say_resharding(before, now, len(shapes)))
        if not finetune:
            tell_changes(reader, self._config, self._extra)
            together(self._mesh, lambda: self._require_same_samples(reader, progress), _no_file)
        if source.is_own and self._saver is not None:
            self._saver.goes_on_from(progress.iteration)
        return progress

    def _finetunes(self, source: Source) -> bool:
        return self._config.checkpoint.finetune and not source.is_own

    def _require_same_samples(self, reader: CheckpointReader, progress: Progress) -> None:
        """Compare what comes next with what the checkpoint says, on rank 0."""
        if self._samples is not None and self._mesh.world.rank == 0:
            require_same_samples(self._samples, reader, progress.consumed_samples, self._extra.get("train_order"))

    def go_back(self, engine: Engine) -> Progress | None:
        """Fill the engine from the last checkpoint that this run saved, or began from in its own folder.

        Returns how far the run had come there, or None where there is no such checkpoint. Every rank calls it."""
        iteration = self._saver.newest() if self._saver is not None else None
        if self._saver is None or iteration is None:
            return None
        save = str(self._config.checkpoint.save)
        found = together(self._mesh, lambda: find_checkpoint(save, iteration), _no_file)
        source = Source(found[self._mesh.world.rank], is_own=True)
        with inside(Phase.LOAD):
            opened = load_or_earlier(
                engine, self._shapes, open_or_earlier(source, self._mesh), self._config, self._mesh
            )
        progress = Progress.from_dict(opened.reader.manifest.progress)
        self._saver.goes_on_from(progress.iteration)
        return progress

    def close(self) -> None:
        """Wait for a save in the background, and leave `save` to other runs."""
        if self._saver is not None:
            # After an error the position stays where that happened.
            with inside(Phase.SAVE) if sys.exception() is None else nullcontext():
                self._saver.close()

    def is_due(self, progress: Progress) -> bool:
        """Say whether the keys of the config ask for a checkpoint now."""
        return progress.iteration in self._due

    def save_if_due(self, engine: Engine, progress: Progress, now: bool = False) -> None:
        """Save where the keys of the config say so, or `now`; under `async_save` in the background.

        A failure before the end of the run costs this checkpoint, and training goes on; at the end it is raised.
        """
        if not now and not self.is_due(progress):
            return
        last = progress.iteration == self._config.training.train_iters
        try:
            self.save(engine, progress, last)
        except CheckpointError as error:
            if last:
                raise
            logger.error("no checkpoint at iteration %d, training goes on. %s", progress.iteration, error)

    def save(self, engine: Engine, progress: Progress, last: bool = True) -> None:
        """Save now, unless this iteration is saved already or `save` is not set.

        last: the run ends with it, and waits until it is written. Raises CheckpointError where it cannot be written."""
        if self._saver is None:
            return
        with inside(Phase.SAVE):
            self._saver.save(progress.iteration, lambda: self._snapshot(engine, progress), last)

    def _snapshot(self, engine: Engine, progress: Progress) -> Snapshot:
        tokenizer = {
            "name": self._tokenizer.name,
            "fingerprint": self._tokenizer.fingerprint(),
            "vocab_size": self._tokenizer.vocab_size,
        }
        extra = {"tokenizer": tokenizer, **self._extra, **self._next_samples(progress)}
        return take_snapshot(progress.iteration, engine.state_pieces(), progress.as_dict(), self._config, extra)

    def written(self) -> list[tuple[int, Storage, float]]:
        """Return (iteration, folder, seconds) of the checkpoints that have been written since the last call."""
        return self._saver.written() if self._saver is not None else []

    def _next_samples(self, progress: Progress) -> dict[str, Any]:
        """Return the record of what comes next, which rank 0 writes."""
        if self._samples is None or self._mesh.world.rank != 0:
            return {}
        return {NEXT_SAMPLES: record_next(self._samples, progress.consumed_samples)}


def _no_file(error: OSError) -> Problem:
    return Problem("the next training samples", f"{error}.", "Restore the data files.")
