"""Checkpoints know nothing of the tensor axis: saved at one size, they load at another, and decode at any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.model import load_model
from megatron.checkpoint.save import save_checkpoint
from megatron.engine.build import build_engine
from megatron.generation.generate import DecodingSettings, generate
from megatron.model.build import build_model
from megatron.model.cache import KVCache
from megatron.model.sequential import SequentialModel
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.char_level import CharLevelTokenizer
from tests.generation import trained
from tests.parallel.matrix import STEPS, VOCAB, full_state, make_batches, make_config, make_mesh, micro_batches
from tests.ranks import run_ranks

TP: dict[str, Any] = {"model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}
MODEL = {"num_kv_heads": 2, "activation": "swiglu", "intermediate_size": 96, "pos_emb": "learned"}

SAVED_AT = 2


def train(root: Path, flat: dict[str, Any], world_size: int, first: int, last: int) -> dict[tuple[str, str], Tensor]:
    """Train steps [first, last), from the checkpoint where first > 0; save after SAVED_AT; return the full state."""
    config = make_config({**MODEL, **flat}, world_size)
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    if first:
        reader = CheckpointReader(find_checkpoint(root))
        reader.verify()
        engine.load_state(reader, with_optimizer=True)
    for step in range(first, last):
        engine.train_step(micro_batches(config, make_batches(config)[step], mesh), step)
        if step + 1 == SAVED_AT:
            save_checkpoint(root, step + 1, engine.state_pieces(), {}, config, None, mesh)
    return full_state(engine)


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one process": ({}, 1),
    "tensor, ZeRO 2": ({**TP, "stage": 2}, 2),
    "sequence, our engine": (SP, 2),
    "tensor and data, ZeRO 3": ({**TP, "stage": 3}, 4),
    "four, ZeRO 1": ({"model_parallel_size": 4, "stage": 1, "num_kv_heads": 4}, 4),
}

ROUTES = [
    ("tensor, ZeRO 2", "one process"),
    ("one process", "tensor, ZeRO 2"),
    ("tensor and data, ZeRO 3", "sequence, our engine"),
    ("sequence, our engine", "tensor and data, ZeRO 3"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("before", "after"), ROUTES)
def test_a_run_continues_at_another_size(tmp_path: Path, before: str, after: str, precision: str) -> None:
    same = {"precision": precision}
    (flat, size), (other, other_size) = LAYOUTS[before], LAYOUTS[after]
    saved = run_ranks(size, train, tmp_path, {**flat, **same}, size, 0, SAVED_AT)[0]
    loaded = run_ranks(other_size, train, tmp_path, {**other, **same}, other_size, SAVED_AT, SAVED_AT)[0]
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key
    if precision == "fp32":
        expected = run_ranks(1, train, tmp_path / "never", {**same}, 1, 0, STEPS)[0]
        continued = run_ranks(other_size, train, tmp_path, {**other, **same}, other_size, SAVED_AT, STEPS)[0]
        for (kind, name), tensor in expected.items():
            if kind == "weight":
                error = (continued[kind, name] - tensor).norm() / tensor.norm().clamp(min=1)
                assert error < 1e-4, name


def decode(root: Path, size: int) -> tuple[Tensor, list[list[int]]]:
    mesh = Mesh.create(tp=size)
    model = load_model(CheckpointReader(find_checkpoint(root)), mesh=mesh)
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(trained.make_config(num_kv_heads=2).model, 2, 9, "cpu", torch.float32, size)
        parts = [model(part, cache=cache) for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    settings = DecodingSettings(trained.make_config(num_kv_heads=2).model, maximum_tokens=12)
    samples = generate(model, CharLevelTokenizer(), ["To be", "or not to be, that is"], settings)
    return whole, [sample.tokens for sample in samples]


@pytest.mark.parametrize("keys", [{}, {"sequence_parallel": True, "pos_emb": "alibi", "no_weight_tying": False}])
def test_two_ranks_decode_what_one_decodes(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = trained.save_model(tmp_path, trained.make_config(num_kv_heads=2, **keys))
    assert isinstance(model, SequentialModel)
    ((logits, samples),) = run_ranks(1, decode, tmp_path, 1)
    for found, theirs in run_ranks(2, decode, tmp_path, 2):
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        assert theirs == samples
