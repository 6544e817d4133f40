"""A run that takes a second: Python text as bytes, a two-layer model, a folder of its own."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.indexed import IndexedWriter
from megatron.monitor.metrics import read_metrics, series


def write_corpus(prefix: Path, num_documents: int = 40) -> Path:
    """Write documents of UTF-8 bytes, each ended by 0, as the CharLevelTokenizer would; return the prefix."""
    text = inspect.getsource(types) + inspect.getsource(inspect)
    length = len(text) // num_documents
    with IndexedWriter(prefix, np.uint16) as writer:
        for start in range(0, length * num_documents, length):
            writer.add_document([*text[start : start + length].encode(), 0])
    return prefix


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the flat keys of a tiny run in `folder`, with `changes`."""
    return {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "make_vocab_size_divisible_by": 64,
        "tokenizer_type": "CharLevelTokenizer",
        "data_path": str(folder / "corpus"),
        "split": "90,5,5",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "train_iters": 8,
        "eval_interval": 4,
        "eval_iters": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95]}},
        "lr_decay_style": "cosine",
        "zero_optimization": {"stage": 1},
        "precision": "fp32",
        "save": str(folder / "checkpoints"),
        "resume": "auto",
        "checkpoint_factor": 2,
        "log_interval": 1,
        "runs_dir": str(folder / "runs"),
        "run_name": "tiny",
        "use_wandb": False,
        **changes,
    }


def config(folder: Path, world_size: int = 1, **changes: Any) -> Config:
    """Return the config of `settings`."""
    return resolve(settings(folder, **changes), world_size)


def losses(folder: Path, event: str = "step") -> dict[int, float]:
    """Return iteration -> loss of one kind of event of the tiny run: "step", "validation" or "test"."""
    records = read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")
    return dict(zip(*series(records, event, "loss"), strict=True))


def stored(save: str) -> dict[tuple[str, str], Tensor]:
    """Return everything that the newest checkpoint of a folder or URL holds, by kind and name."""
    reader = CheckpointReader(find_checkpoint(save))
    return {(kind, name): reader.read(name, kind) for kind in reader.kinds for name in reader.names(kind)}  # type: ignore[misc]


def tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Return everything that the newest checkpoint of the tiny run holds."""
    return stored(str(folder / "checkpoints"))
