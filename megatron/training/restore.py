"""Filling the engine from a checkpoint, and saying what is different from the run that is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.compatible import changed_settings, require_same_model, require_shapes
from megatron.checkpoint.load import CheckpointReader
from megatron.config.schema.config import Config
from megatron.engine.base import Engine
from megatron.errors import DamagedCheckpointError
from megatron.logs import get_logger
from megatron.parallel.mesh import Mesh
from megatron.training.source import Opened, open_or_earlier, stand_in

logger = get_logger(__name__)


def load_or_earlier(
    engine: Engine, shapes: Mapping[str, tuple[int, ...]], opened: Opened, config: Config, mesh: Mesh
) -> Opened:
    """Fill the engine from a checkpoint, or from the next that stands in for it; return the one that was loaded.

    shapes: canonical name -> full shape of the weights of this run's model. Every rank must call it.
    """
    while True:
        source, reader = opened.source, opened.reader
        finetune = config.checkpoint.finetune and not source.is_own
        require_same_model(reader, config)
        require_shapes(reader, shapes)
        try:
            engine.load_state(reader, with_optimizer=not (config.checkpoint.no_load_optim or finetune))
            return opened
        except DamagedCheckpointError as error:
            opened = open_or_earlier(stand_in(source, error), mesh)


def tell_changes(reader: CheckpointReader, config: Config, recorded: Mapping[str, Any]) -> None:
    """Say what is different from the run that is continued, so that nothing changes unseen.

    recorded: "train_order" of this run, see `DataSets`.
    """
    changes = changed_settings(reader, config)
    if changes:
        logger.info("changed since that checkpoint: %s", ", ".join(changes))
    before, now = reader.manifest.extra.get("train_order"), recorded.get("train_order")
    if before is not None and now is not None and before != now:
        logger.warning(
            "The training samples come in another order than before the checkpoint (other data, split, seq_length, "
            "seed or number of epochs): from here on some may come again, and others not at all."
        )
