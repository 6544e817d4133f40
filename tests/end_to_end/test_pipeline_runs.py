"""Whole runs on pipelines: stopped, moved to another layout, killed; validated, saved, and loaded into one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.model import load_model
from tests.end_to_end.layouts import assert_the_same_run
from tests.end_to_end.test_resume import run
from tests.end_to_end.tiny import losses, tensors, write_corpus
from tests.ranks import run_ranks

TIED = {"no_weight_tying": False, "num_layers": 3}
EXACT = {**TIED, "hidden_dropout": 0.0, "attention_dropout": 0.0}
PIPELINE = {"pipe_parallel_size": 2}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("whole", "broken"):
        write_corpus(tmp_path / name / "corpus")
    return tmp_path / "whole", tmp_path / "broken"


def test_a_run_that_changes_its_layout_is_the_run_that_does_not(folders: tuple[Path, Path]) -> None:
    """One process, a pipeline, two pipelines, two data-parallel ranks with ZeRO 3, and a pipeline again."""
    whole, broken = folders
    halved = {"gradient_accumulation_steps": 1}
    layouts: list[tuple[int, int, dict[str, Any]]] = [
        (1, 1, {"zero_optimization": {"stage": 0}}),
        (2, 3, {**PIPELINE, "zero_optimization": {"stage": 0}}),
        (4, 5, {**PIPELINE, **halved}),
        (2, 6, {**halved, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 50}}),
        (2, 8, PIPELINE),
    ]
    assert_the_same_run(whole, broken, EXACT, layouts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pipeline_with_dropout_continues_bitwise(folders: tuple[Path, Path], precision: str) -> None:
    whole, broken = folders
    changes = {**TIED, **PIPELINE, "precision": precision, "checkpoint_activations": True}
    run_ranks(2, lambda: run(whole, 2, **changes))
    run_ranks(2, lambda: run(broken, 2, exit_interval=4, **changes))
    run_ranks(2, lambda: run(broken, 2, **changes))
    assert losses(whole) == losses(broken)
    assert losses(whole, "validation") == losses(broken, "validation")
    expected, found = tensors(whole), tensors(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_pipelines_checkpoint_is_a_model_in_one_process(folders: tuple[Path, Path]) -> None:
    whole, piped = folders
    run_ranks(1, lambda: run(whole, **EXACT))
    run_ranks(2, lambda: run(piped, 2, **EXACT, **PIPELINE))
    tokens = torch.arange(32).view(2, 16)
    one, other = (load_model(CheckpointReader(find_checkpoint(f / "checkpoints")))(tokens) for f in folders)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
