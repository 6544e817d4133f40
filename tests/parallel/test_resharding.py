"""A chain of loads and saves in other layouts, without a step between them, changes no bit of the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.engine.build import build_engine
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.parallel.matrix import VOCAB, make_batches, make_config, make_mesh, micro_batches
from tests.ranks import run_ranks

MODEL: dict[str, Any] = {
    "activation": "swiglu", "intermediate_size": 96, "num_kv_heads": 2, "no_weight_tying": False, "precision": "fp16",
    "fp16": {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 2, "hysteresis": 1},
}  # fmt: skip
CHAIN: list[tuple[dict[str, Any], int]] = [
    ({"model_parallel_size": 2, "stage": 1}, 2),
    ({"pipe_parallel_size": 2, "stage": 1}, 2),
    ({"stage": 3}, 2),
    ({"model_parallel_size": 2, "pipe_parallel_size": 2, "stage": 1}, 4),
    ({"stage": 0}, 2),
    ({"context_parallel_size": 2, "stage": 2}, 2),
    ({}, 1),
]


def carry(root: Path, flat: dict[str, Any], world_size: int, number: int) -> None:
    """Load the newest checkpoint, or train three steps where there is none, and save one more."""
    type(get_accelerator()).is_fp16_supported = lambda self: True  # DeepSpeed asks for fp16 instructions on the CPU
    config = make_config({**MODEL, **flat}, world_size)
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    if number:
        engine.load_state(CheckpointReader(find_checkpoint(root)), with_optimizer=True)
        engine.check_masters()
    else:
        for step in range(3):
            engine.train_step(micro_batches(config, make_batches(config)[step], mesh), step)
    save_checkpoint(root, number, engine.state_pieces(), {}, config, None, mesh)


def test_seven_layouts_hand_on_every_bit(tmp_path: Path) -> None:
    for number, (flat, world_size) in enumerate(CHAIN):
        run_ranks(world_size, carry, tmp_path, flat, world_size, number)
    first, *others = (CheckpointReader(tmp_path / f"global_step{number}") for number in range(len(CHAIN)))
    kinds = {"weight", "master", "exp_avg", "exp_avg_sq", "step", "loss_scaler"}
    assert set(first.kinds) == kinds
    scale = first.read("loss_scaler", "loss_scaler")
    assert scale is not None
    assert scale[0] != 2.0**14  # it has moved
    for number, other in enumerate(others, 1):
        assert set(other.kinds) == kinds
        for kind in kinds:
            assert sorted(other.names(kind)) == sorted(first.names(kind))
            for name in first.names(kind):
                ours, theirs = other.read(name, kind), first.read(name, kind)
                assert ours is not None
                assert theirs is not None
                assert torch.equal(ours, theirs), (number, kind, name)
