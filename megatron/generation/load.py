"""A trained model and its tokenizer from a checkpoint. There is no way to get fresh weights here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron import logs
from megatron.checkpoint.compatible import require_tokenizer, stored_config
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.model import WORD_EMBEDDINGS, load_model, stored_tokenizer
from megatron.checkpoint.storage import Storage
from megatron.config.schema.config import Config
from megatron.errors import CheckpointError, ConfigError, Problem
from megatron.model.accounting import mlp_shape
from megatron.model.sequential import SequentialModel
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, its tokenizer, the config it was trained with, and where it came from."""

    model: SequentialModel
    tokenizer: Tokenizer
    config: Config
    folder: Storage


def load_trained(
    root: Path | str,
    iteration: int | None = None,
    device: str | torch.device = "cpu",
    mesh: Mesh | None = None,
) -> Trained:
    """Return the model of the newest checkpoint in `root`, or of the given iteration, on one device.

    mesh: instead of one device, the mesh whose tensor axis shares the model; all its ranks call this.
    Model, precision and tokenizer are those of the checkpoint; fp16 becomes fp32 on the CPU, which has no fast fp16.
    Raises CheckpointError where there is none, or it is damaged, TokenizerError where its tokenizer is not found, and
    ConfigError where its model cannot be shared by as many processes.
    """
    mesh = mesh or Mesh.single(device)
    reader = CheckpointReader(find_checkpoint(root, iteration))
    config = stored_config(reader)
    tokenizer = build_tokenizer(stored_tokenizer(reader))
    require_tokenizer(reader, tokenizer.name, tokenizer.fingerprint())
    _require_rows(reader, tokenizer)
    _require_shares(reader, config, mesh.tp.size)
    precision = "fp32" if mesh.device.type == "cpu" and config.numerics.precision == "fp16" else None
    model = load_model(reader, precision=precision, mesh=mesh)
    logger.info("loaded %s: model, precision and tokenizer are those it was trained with", reader.folder)
    return Trained(model, tokenizer, config, reader.folder)


def _require_rows(reader: CheckpointReader, tokenizer: Tokenizer) -> None:
    """Raise where the tokenizer has ids beyond the word embedding."""
    rows = reader.shapes.get(WORD_EMBEDDINGS, (0,))[0]
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            Problem(
                where=str(reader.folder),
                what=f"tokenizer {tokenizer.name}",
                why=f"It has {tokenizer.vocab_size} ids and the model's word embedding {rows} rows.",
                fix="Use the tokenizer that the model was trained with.",
            )
        )


def _require_shares(reader: CheckpointReader, config: Config, count: int) -> None:
    """Raise where the model that was trained is another than the config describes, and `count` cannot share it."""
    model, rows = config.model, reader.shapes.get(WORD_EMBEDDINGS, (0,))[0]
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_kv_heads or count,
        "the MLP's width": mlp_shape(model)[1],
        "rows of the word embedding": rows,
    }
    for what, size in sizes.items():
        if size % count:
            raise ConfigError(
                Problem(
                    where=str(reader.folder),
                    what=f"{count} processes, of model_parallel_size and pipe_parallel_size",
                    why=f"they cannot share this model: {what} = {size}.",
                    fix="Set model_parallel_size: 1 and pipe_parallel_size: 1; one process then decodes.",
                )
            )
