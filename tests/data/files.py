"""Small token files and configs for the tests of the data sets."""

from pathlib import Path

import numpy as np

from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.documents import Documents
from megatron.data.indexed import IndexedDataset, IndexedWriter


def write_documents(prefix: Path, sizes: list[int], seed: int = 0, vocab_size: int = 500) -> str:
    """Write a token file with documents of `sizes` random tokens (empty ones included); return its prefix."""
    generator = np.random.RandomState(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for size in sizes:
            writer.add_document(generator.randint(0, vocab_size, size))
    return str(prefix)


def write_labels(prefix: Path, text: str, ignored_documents: set[int]) -> str:
    """Write labels parallel to `text`: its tokens, but all ignored in `ignored_documents` and in every first token."""
    with IndexedWriter(prefix, np.int32) as writer:
        for number, document in enumerate(IndexedDataset(text)):
            labels = document.astype(np.int32)
            labels[: None if number in ignored_documents else 1] = -100
            writer.add_document(labels)
    return str(prefix)


def documents_of(prefix: str, labels: str | None = None) -> Documents:
    return Documents.whole(IndexedDataset(prefix), IndexedDataset(labels) if labels else None)


def config_of(world_size: int = 1, **keys: object) -> Config:
    """A config of a tiny run; `keys` are flat YAML keys."""
    defaults: dict[str, object] = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "train_micro_batch_size_per_gpu": 2,
        "train_iters": 10,
        "eval_interval": 5,
        "eval_iters": 1,
        "num_workers": 0,
    }
    if "train_epochs" in keys:
        del defaults["train_iters"]
    return resolve({**defaults, **keys}, world_size=world_size)
