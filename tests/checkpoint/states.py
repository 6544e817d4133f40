"""Small training states for the tests of checkpoints: every dtype, odd shapes, random partitions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensor_file import DTYPES
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.parallel.sharding import ShardSpec, StatePiece, split

State = dict[tuple[str, str], Tensor]

SHAPES = {
    "embedding.word_embeddings.weight": (13, 6),
    "layers.0.mlp.linear1.bias": (7,),
    "scale": (),
    "head": (1, 5, 3),
}


def small_config(**keys: Any) -> Config:
    flat = {
        "num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "max_position_embeddings": 16,
        "pos_emb": "rotary", "train_iters": 100, "lr_decay_iters": 100,
        "optimizer": {"type": "adam", "params": {"lr": 0.001}},
    }  # fmt: skip
    return resolve({**flat, **keys})


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return arbitrary bits of the dtype, NaNs included; booleans are 0 and 1."""
    count = max(1, torch.Size(shape).numel())
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def make_state(seed: int = 0) -> State:
    """Return weights in bf16, masters that round to them, and one moment."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in SHAPES.items():
        master = torch.randn(shape, generator=generator)
        state[name, "master"] = master
        state[name, "weight"] = master.bfloat16()
        state[name, "exp_avg"] = torch.randn(shape, generator=generator)
    return state


def all_dtypes(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        (f"{name}.{label}", "weight"): random_tensor(shape, dtype, generator)
        for name, shape in SHAPES.items()
        for label, dtype in DTYPES.items()
    }


def whole(state: State) -> list[StatePiece]:
    """Return one piece for each tensor."""
    return [StatePiece(name, kind, tuple(t.shape), 0, t.reshape(-1)) for (name, kind), t in state.items()]


def scattered(state: State, ranks: int, dice: random.Random) -> list[list[StatePiece]]:
    """Cut every tensor at random places and deal the pieces to `ranks` owners, in random order."""
    owned: list[list[StatePiece]] = [[] for _ in range(ranks)]
    for (name, kind), tensor in state.items():
        flat = tensor.reshape(-1)
        cuts = sorted(dice.randint(0, flat.numel()) for _ in range(dice.randint(0, 4)))
        edges = [0, *cuts, flat.numel()]
        for start, end in itertools.pairwise(edges):
            dice.choice(owned).append(StatePiece(name, kind, tuple(tensor.shape), start, flat[start:end]))
    for pieces in owned:
        dice.shuffle(pieces)
    return owned


def shares(name: str, tensor: Tensor, size: int, spec: ShardSpec) -> Iterator[StatePiece]:
    """Yield each tensor-parallel share in two pieces."""
    for rank in range(size):
        share = split(tensor, spec, size, rank)
        flat = share.reshape(-1)
        half = flat.numel() // 2
        for start, data in ((0, flat[:half]), (half, flat[half:])):
            yield StatePiece(name, "weight", tuple(share.shape), start, data, (rank, size), spec)


def same_bits(left: Tensor | None, right: Tensor) -> bool:
    """Compare dtype, shape and bits, so that NaNs are equal to themselves."""
    if left is None or left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
