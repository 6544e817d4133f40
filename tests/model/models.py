"""Small models for tests."""

from __future__ import annotations

from typing import Any

import torch

from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.model.build import build_model
from megatron.model.sequential import SequentialModel
from megatron.parallel.mesh import Mesh

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 1,
}
VOCAB = 128


def small_config(**settings: Any) -> Config:
    """Return a resolved config of two layers with `settings` on top."""
    return resolve({**SMALL, **settings})


def small_model(**settings: Any) -> SequentialModel:
    """Return a model of two layers whose weights are all drawn wide enough that every part of it matters."""
    model = build_model(small_config(**settings), VOCAB, Mesh.single())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(parameter.float() * 0.1 + noise if parameter.dim() > 1 else parameter.float() + noise)
    return model


def random_tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Return [rows, length] token ids."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
