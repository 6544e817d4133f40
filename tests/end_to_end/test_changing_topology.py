"""A run that changes its topology at each of five resumes is the run that never stopped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron import logs
from tests.end_to_end.test_resume import run
from tests.end_to_end.tiny import losses, write_corpus
from tests.ranks import run_ranks

MODEL: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation": "swiglu",
    "intermediate_size": 48,
    "num_kv_heads": 2,
    "no_weight_tying": False,
    "train_iters": 12,
    "eval_iters": 1,
    "checkpoint_factor": 100,
}
COUNT = 27  # tensors of the model
TOPOLOGIES: list[tuple[str, int, dict[str, Any]]] = [
    ("tp2 pp1 dp1 zero1", 2, {"model_parallel_size": 2}),
    ("tp1 pp2 dp1 zero1", 2, {"pipe_parallel_size": 2}),
    ("tp1 pp1 dp2 zero3", 2, {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 1}),
    ("tp2 pp2 dp1 zero1", 4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
    ("tp1 pp1 dp1 cp2 zero1", 2, {"context_parallel_size": 2}),
    ("tp1 pp1 dp1 zero1", 1, {}),
]


def run_quietly(*arguments: Any, **changes: Any) -> None:
    """Train as a launched process does, where only rank 0 speaks."""
    logs.setup(torch.distributed.get_rank())
    run(*arguments, **changes)


def test_five_changes_of_topology_change_no_loss(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    for folder in (whole, moved):
        write_corpus(folder / "corpus")
    run_ranks(1, lambda: run(whole, **MODEL))
    before = None
    for name, world_size, layout in TOPOLOGIES:
        capfd.readouterr()
        run_ranks(world_size, functools.partial(run_quietly, moved, world_size, exit_interval=2, **MODEL, **layout))
        said = capfd.readouterr().err
        if before is not None:
            assert said.count(f"checkpoint {before} -> run {name}: {COUNT} tensors re-sharded") == 1
            assert said.count("masters equal to the weights on every rank") == 1
            assert said.count("are those that the checkpoint expects") == 1
        before = name
    for kind in ("step", "validation"):
        expected, found = losses(whole, kind), losses(moved, kind)
        assert found.keys() >= expected.keys()
        for iteration, loss in expected.items():
            assert found[iteration] == pytest.approx(loss, rel=1e-6), (kind, iteration)
