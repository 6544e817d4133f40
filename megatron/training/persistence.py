"""What a run keeps on disk of itself: where it resumes, and when and how it saves.

    keeper = Keeper(config, mesh, tokenizer)        # finds the checkpoint first: nothing is built for a wrong path
    progress = keeper.restore(engine, shapes)
    keeper.save_if_due(engine, progress)
"""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.compatible import require_same_model, require_shapes, require_tokenizer
from megatron.checkpoint.layout import loadable_steps
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
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

logger = get_logger(__name__)


def find_source(config: CheckpointConfig) -> Path | None:
    """Return the checkpoint folder that a run begins from, or None where it begins from fresh weights.

    `resume: auto` prefers the newest checkpoint under `save`; `load` must exist or the run stops.
    Raises CheckpointError where `load` finds nothing, or where `save` holds another run's checkpoints.
    """
    saved = loadable_steps(Path(config.save)) if config.save else {}
    if config.resume == "auto" and saved:
        return find_checkpoint(Path(str(config.save)), config.iteration)
    if config.load is not None:
        return find_checkpoint(Path(config.load), config.iteration)
    if saved:
        raise CheckpointError(
            Problem(
                what=f"save = {config.save}",
                why=f"it already holds checkpoints, up to iteration {max(saved)}, and this run would begin anew.",
                fix=f"Set resume: auto to continue them, load: {config.save} to continue a certain one, or another save.",
            )
        )
    return None


class Keeper:
    """Restores a run's state when it begins and saves it when that is due."""

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> None:
        self._config = config
        self._mesh = mesh
        self._tokenizer = tokenizer
        self._due = frozenset(save_iterations(config.checkpoint, config.training.train_iters or 0))
        self._last_saved: int | None = None
        folder = find_source(config.checkpoint)
        self._reader = CheckpointReader(folder) if folder else None
        if self._reader is not None:
            require_same_model(self._reader, config)
            require_tokenizer(self._reader, tokenizer.name, tokenizer.fingerprint())

    @property
    def is_fresh(self) -> bool:
        """Whether the run begins from initial weights, so that drawing them is not in vain."""
        return self._reader is None

    def restore(self, engine: Engine, shapes: dict[str, tuple[int, ...]]) -> Progress:
        """Fill the engine from the checkpoint, if there is one, and return how far that run had come.

        shapes: canonical name -> full shape of the weights of this run's model.
        With `finetune` or a checkpoint of another folder's run without its optimizer, only what was asked for loads.
        """
        if self._reader is None:
            logger.info("starting from initial weights (seed %d)", self._config.numerics.seed)
            return Progress()
        settings = self._config.checkpoint
        is_own = settings.save is not None and self._reader.folder.parent == Path(settings.save)
        finetune = settings.finetune and not is_own
        with_optimizer = not (settings.no_load_optim or finetune)
        require_shapes(self._reader, shapes)
        engine.load_state(self._reader.read, with_optimizer)
        progress = Progress() if finetune else Progress.from_dict(self._reader.manifest.progress)
        logger.info(
            "loaded %s: %d tensors, %s; continuing after iteration %d",
            self._reader.folder,
            len(shapes),
            "optimizer state included" if with_optimizer else "weights only",
            progress.iteration,
        )
        if is_own:
            self._last_saved = progress.iteration
        self._reader = None
        return progress

    def save_if_due(self, engine: Engine, progress: Progress) -> Path | None:
        """Save where the keys of the config say so, and return the folder.

        A failure before the end of the run costs this checkpoint, and training goes on; at the end it is raised.
        """
        if progress.iteration not in self._due:
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
        if settings.save is None or self._last_saved == progress.iteration:
            return None
        tokenizer = {
            "name": self._tokenizer.name,
            "fingerprint": self._tokenizer.fingerprint(),
            "vocab_size": self._tokenizer.vocab_size,
        }
        folder = save_checkpoint(
            Path(settings.save),
            progress.iteration,
            engine.state_pieces(),
            progress.as_dict(),
            self._config,
            {"tokenizer": tokenizer},
            self._mesh,
        )
        self._last_saved = progress.iteration
        return folder
