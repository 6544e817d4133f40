"""A checkpoint as a model to call: what generation, export and inspection start from.

In one process, whatever layout trained it; or on the tensor axis of a mesh, each rank with its share.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron.checkpoint.compatible import require_shapes, stored_config
from megatron.checkpoint.load import CheckpointReader
from megatron.checkpoint.storage import Storage
from megatron.config.schema.config import Config
from megatron.config.schema.data import TokenizerConfig
from megatron.model.build import build_model
from megatron.model.sequential import SequentialModel
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.sharding import StateRequest, get_spec, split

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


def load_model(
    reader: CheckpointReader,
    device: str | torch.device = "cpu",
    precision: str | None = None,
    read: Callable[[str], Tensor | None] | None = None,
    mesh: Mesh | None = None,
) -> SequentialModel:
    """Return the checkpoint's model on one device, in evaluation mode.

    precision: "fp32", "fp16" or "bf16"; None keeps that of the training run, which after fp8 is bf16.
    read: returns a weight by its canonical name; None reads the checkpoint's own.
    mesh: instead of one device, the mesh whose tensor axis shares the model; all its ranks call this.
    Raises CheckpointError where the weights are not those of the stored config.
    """
    config = stored_config(reader)
    config = with_precision(config, precision or config.numerics.weight_precision)
    shape = reader.shapes.get(WORD_EMBEDDINGS)
    rows = shape[0] if shape else 0
    mesh = mesh or Mesh.single(device)
    model = build_model(_decoding(config), rows, mesh, initialized=False)
    assert isinstance(model, SequentialModel), "a mesh with a pipeline trains only"
    require_shapes(reader, model.full_shapes())
    if read is None:
        fill_from(reader, model, mesh.tp)
    else:
        fill_parameters(model, read, mesh.tp)
    return model.eval().requires_grad_(False)


def _decoding(config: Config) -> Config:
    """Return the config without sequence parallelism, which needs more tokens at once than decoding has."""
    parallel = config.parallel.model_copy(update={"sequence_parallel": False})
    return config.model_copy(update={"parallel": parallel})


def fill_from(reader: CheckpointReader, model: nn.Module, axis: Axis) -> None:
    """Read this rank's share of every weight of the checkpoint straight into the model."""
    reader.fill(
        StateRequest(name, "weight", 0, parameter.data.view(-1), (axis.rank, axis.size), get_spec(parameter))
        for name, parameter in model.named_parameters()
    )


def fill_parameters(model: nn.Module, read: Callable[[str], Tensor | None], axis: Axis) -> None:
    """Copy this rank's share of every tensor `read(canonical name)`, one in memory at a time."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = read(name)
            assert values is not None, f"{name} has been checked to be there"
            parameter.copy_(split(values, get_spec(parameter), axis.size, axis.rank))


def with_precision(config: Config, precision: str) -> Config:
    """Return the config with another precision."""
    numerics = config.numerics.model_copy(update={"precision": precision})
    return config.model_copy(update={"numerics": numerics})


def stored_tokenizer(reader: CheckpointReader) -> TokenizerConfig:
    """Return the tokenizer's config, with the checkpoint's own copies of its files where it has them."""
    config = stored_config(reader).tokenizer
    files = reader.manifest.tokenizer.get("files", {})
    place = reader.folder.local_path() or (_fetched(reader.folder) if files else Path())
    own = {key: str(place / name) for key, name in files.items()}
    return config.model_copy(update=own)


def _fetched(folder: Storage) -> Path:
    """Return a folder of this machine with a copy of the tokenizer's files, which goes when the process ends."""
    place = Path(tempfile.mkdtemp(prefix="deepy-tokenizer-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    (place / "tokenizer").mkdir()
    for name in folder.at("tokenizer").files():
        (place / "tokenizer" / name).write_bytes(folder.read(f"tokenizer/{name}"))
    return place
