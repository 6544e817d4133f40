"""What a run keeps on disk of itself: where it resumes, and when and how it saves.

keeper = Keeper(config, mesh, tokenizer)  # finds the checkpoint first: nothing is built for a wrong path
progress = keeper.restore(engine, shapes)
keeper.save_if_due(engine, progress)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.compatible import changed_settings, require_same_model, require_shapes, require_tokenizer
from megatron.checkpoint.layout import foreign_steps, loadable_steps
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.lock import FolderLock
from megatron.checkpoint.model import WORD_EMBEDDINGS
from megatron.checkpoint.retention import save_iterations
from megatron.checkpoint.save import save_checkpoint
from megatron.config.schema.config import Config
from megatron.config.schema.run import CheckpointConfig
from megatron.engine.base import Engine
from megatron.errors import CheckpointError, Problem
from megatron.logs import get_logger
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.base import Tokenizer
from megatron.training.progress import Progress
from megatron.whereabouts import Phase, inside

logger = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run begins from. is_own: it lies in the run's own `save`, and the run goes on from it."""

    folder: Path
    is_own: bool


def find_source(config: CheckpointConfig) -> Source | None:
    """Return where a run begins from, or None where it begins from fresh weights.

    `resume: auto` prefers the newest checkpoint under `save`; `load` must exist or the run stops.
    Raises CheckpointError where `load` finds nothing, or where the run would write over another run's checkpoints.
    """
    save = Path(config.save) if config.save else None
    saved = loadable_steps(save) if save else {}
    if save and (foreign := foreign_steps(save)):
        raise _foreign(config, foreign)
    if config.resume == "auto" and save and saved:
        return Source(find_checkpoint(save, config.iteration), is_own=True)
    if config.load is not None and save and not saved and Path(config.load).resolve() == save.resolve():
        why = "it is the folder that this run saves to, and it holds no checkpoint yet."
        fix = "Write resume: auto instead of load: a run then begins anew where there is none, and else goes on."
        raise CheckpointError(Problem(f"load = {config.load}", why, fix))
    folder = find_checkpoint(config.load, config.iteration) if config.load is not None else None
    is_own = folder is not None and save is not None and folder.resolve().parent == save.resolve()
    if saved and (not is_own or config.finetune):
        raise _occupied(config, max(saved), is_own)
    return Source(folder, is_own) if folder else None


def _occupied(config: CheckpointConfig, newest: int, is_own: bool) -> CheckpointError:
    """Return the error of a run that begins at step 0, or from elsewhere, in a folder that holds checkpoints."""
    why = f"it already holds checkpoints, up to iteration {newest}, and this run would write over them"
    if is_own:
        return CheckpointError(
            Problem(f"save = {config.save}", f"{why}: finetune begins at step 0.", "Set save to another folder.")
        )
    to_load = f", load: {config.save} to continue a certain one" if config.load is None else ""
    fix = f"Set resume: auto to continue the newest{to_load}, or set save to another folder."
    return CheckpointError(Problem(f"save = {config.save}", f"{why}.", fix))


def _foreign(config: CheckpointConfig, names: list[str]) -> CheckpointError:
    """Return the error of a run whose checkpoints would replace folders that are not this library's."""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    why = f"it holds {listed} without a manifest.json (of GPT-NeoX, or an incomplete copy), which saves would replace."
    return CheckpointError(Problem(f"save = {config.save}", why, "Move them away, or set save to another folder."))


class Keeper:
    """Restores a run's state when it begins and saves it when that is due; `save` is its own until it is closed.

    extra: what each checkpoint records besides: "train_order" (see `DataSets`), "config_files" ({name: text}).
    """

    def __init__(
        self, config: Config, mesh: Mesh, tokenizer: Tokenizer, extra: Mapping[str, Any] | None = None
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._tokenizer = tokenizer
        self._extra = dict(extra or {})
        self._due = frozenset(save_iterations(config.checkpoint, config.training.train_iters or 0))
        self._last_saved: int | None = None
        self._lock = FolderLock(Path(config.checkpoint.save), mesh) if config.checkpoint.save else None
        self._source = find_source(config.checkpoint)
        self._reader = CheckpointReader(self._source.folder) if self._source else None
        if self._reader is not None:
            require_same_model(self._reader, config)
            require_tokenizer(self._reader, tokenizer.name, tokenizer.fingerprint())

    @property
    def is_fresh(self) -> bool:
        """Whether the run begins from initial weights, so that drawing them is not in vain."""
        return self._reader is None

    def vocabulary(self, planned: int, tensor_parallel_size: int) -> int:
        """Return the rows of the word embedding: the checkpoint's where there is one, so that no layout changes them.

        planned: the rows that a new model would have, padding included.
        Raises CheckpointError where the checkpoint's rows cannot be shared by the tensor parallel ranks.
        """
        rows = self._reader.shapes.get(WORD_EMBEDDINGS, (planned,))[0] if self._reader else planned
        if self._reader is None or rows == planned or rows < self._tokenizer.vocab_size:
            return planned  # where it is too small, `restore` refuses it by name
        if rows % tensor_parallel_size:
            raise CheckpointError(
                Problem(
                    f"model_parallel_size = {tensor_parallel_size}",
                    f"The checkpoint's vocabulary of {rows:,} rows cannot be divided by it.",
                    f"Set model_parallel_size to a divisor of {rows:,}.",
                    str(self._reader.folder),
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
        """
        if self._reader is None or self._source is None:
            logger.info("starting from initial weights (seed %d)", self._config.numerics.seed)
            return Progress()
        settings = self._config.checkpoint
        finetune = settings.finetune and not self._source.is_own
        with_optimizer = not (settings.no_load_optim or finetune)
        require_shapes(self._reader, shapes)
        engine.load_state(self._reader, with_optimizer)
        progress = Progress() if finetune else Progress.from_dict(self._reader.manifest.progress)
        logger.info(
            "loaded %s: %d tensors, %s, masters equal to the weights on every rank; continuing after iteration %d",
            self._reader.folder,
            len(shapes),
            "optimizer state included" if with_optimizer else "weights only",
            progress.iteration,
        )
        if not finetune:
            self._tell_changes(self._reader)
        if self._source.is_own:
            self._last_saved = progress.iteration
        self._reader = None
        return progress

    def _tell_changes(self, reader: CheckpointReader) -> None:
        """Say what is different from the run that is continued, so that nothing changes unseen."""
        changes = changed_settings(reader, self._config)
        if changes:
            logger.info("changed since that checkpoint: %s", ", ".join(changes))
        before, now = reader.manifest.extra.get("train_order"), self._extra.get("train_order")
        if before is not None and now is not None and before != now:
            logger.warning(
                "The training samples come in another order than before the checkpoint (other data, split, seq_length, "
                "seed or number of epochs): from here on some may come again, and others not at all."
            )

    def close(self) -> None:
        """Leave `save` to other runs."""
        if self._lock is not None:
            self._lock.release()

    def is_due(self, progress: Progress) -> bool:
        """Say whether the keys of the config ask for a checkpoint now."""
        return progress.iteration in self._due

    def save_if_due(self, engine: Engine, progress: Progress, now: bool = False) -> Path | None:
        """Save where the keys of the config say so, or `now`, and return the folder.

        A failure before the end of the run costs this checkpoint, and training goes on; at the end it is raised.
        """
        if not now and not self.is_due(progress):
            return None
        try:
            return self.save(engine, progress)
        except CheckpointError as error:
            if progress.iteration == self._config.training.train_iters:
                raise
            logger.error("no checkpoint at iteration %d, training goes on. %s", progress.iteration, error)
            return None

    def save(self, engine: Engine, progress: Progress) -> Path | None:
        """Save now and return the folder, or None where this iteration is saved already or `save` is not set.

        Raises CheckpointError where it cannot be written."""
        settings = self._config.checkpoint
        if not settings.save or self._last_saved == progress.iteration:
            return None
        tokenizer = {
            "name": self._tokenizer.name,
            "fingerprint": self._tokenizer.fingerprint(),
            "vocab_size": self._tokenizer.vocab_size,
        }
        with inside(Phase.SAVE):
            folder = save_checkpoint(
                Path(settings.save),
                progress.iteration,
                engine.state_pieces(),
                progress.as_dict(),
                self._config,
                {"tokenizer": tokenizer, **self._extra},
                self._mesh,
            )
        self._last_saved = progress.iteration
        return folder
