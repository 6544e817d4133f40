"""A small model with random weights as a checkpoint, for the tests of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.checkpoint.save import save_checkpoint
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.model.build import build_model
from megatron.model.sequential import SequentialModel
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece
from megatron.tokenizer.build import build_tokenizer

ROWS = 512


def make_config(**keys: Any) -> Config:
    flat = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 48, "max_position_embeddings": 48,
        "pos_emb": "rotary", "no_weight_tying": True, "tokenizer_type": "CharLevelTokenizer", "train_iters": 10,
        "lr_decay_iters": 10, "optimizer": {"type": "adam", "params": {"lr": 0.001}}, "init_method_std": 0.4,
    }  # fmt: skip
    return resolve({**flat, **keys})


def make_model(config: Config) -> SequentialModel:
    return build_model(config, ROWS, Mesh.single()).eval().requires_grad_(False)


def save_model(root: Path, config: Config, iteration: int = 3) -> SequentialModel:
    """Save freshly drawn weights as a checkpoint and return the model."""
    model = make_model(config)
    pieces = [StatePiece(n, "weight", tuple(p.shape), 0, p.reshape(-1)) for n, p in model.named_parameters()]
    tokenizer = build_tokenizer(config.tokenizer)
    record = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint()}
    save_checkpoint(root, iteration, pieces, {"iteration": iteration}, config, {"tokenizer": record}, Mesh.single())
    return model
