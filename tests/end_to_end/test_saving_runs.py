"""Whole runs that save in the background and to a bucket are, bit by bit, those that wait and save to a folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import lock
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.steps import whole_steps
from megatron.checkpoint.storage import storage_of
from megatron.engine.step import StepEngine
from megatron.parallel.mesh import Mesh
from megatron.training.run import train
from tests.checkpoint.s3_server import S3Server
from tests.end_to_end.tiny import config, losses, write_corpus
from tests.ranks import RankError, run_ranks


def run(folder: Path, world_size: int = 1, **changes: Any) -> int:
    """Train the tiny run as one rank of `world_size`; return the iteration that it reached."""
    few = {"train_iters": 6, "eval_iters": 0}
    return train(config(folder, world_size, **few, **changes), Mesh.create()).progress.iteration


def run_killed(folder: Path, at: int, **changes: Any) -> None:
    """Train, and die as by kill -9 before the step after `at` updates, whatever is being written then."""
    step: Callable[..., Any] = StepEngine.queue_step

    def dying_step(self: StepEngine, batches: Any, iteration: int, *rest: Any) -> Any:
        if iteration == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batches, iteration, *rest)

    StepEngine.queue_step = dying_step  # type: ignore[method-assign]
    run(folder, **changes)


def assert_same(root: str, other: str, iteration: int) -> None:
    """Compare every tensor of two checkpoints, and prove both."""
    readers = [CheckpointReader(find_checkpoint(place, iteration)) for place in (root, other)]
    for reader in readers:
        reader.verify()
    assert readers[0].kinds == readers[1].kinds
    for kind in readers[0].kinds:
        for name in readers[0].names(kind):
            first, second = (reader.read(name, kind) for reader in readers)
            assert first is not None
            assert second is not None
            assert torch.equal(first, second), (iteration, kind, name)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("waiting", "going_on"):
        write_corpus(tmp_path / name / "corpus")
    return tmp_path / "waiting", tmp_path / "going_on"


def test_a_run_of_two_ranks_that_saves_in_the_background(
    folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    waiting, going_on = folders
    keys = {"gradient_accumulation_steps": 1, "precision": "bf16", "zero_optimization": {"stage": 2}}
    run_ranks(2, lambda: run(waiting, 2, **keys))
    run_ranks(2, lambda: run(going_on, 2, async_save=True, **keys))
    assert losses(waiting) == losses(going_on)
    for iteration in (2, 4, 6):
        assert_same(str(waiting / "checkpoints"), str(going_on / "checkpoints"), iteration)
    said = capfd.readouterr().err
    assert said.count("in the background: blocked ") == 2  # the last one ends the run, which waits for it


def test_a_killed_run_goes_on_from_its_bucket(
    folders: tuple[Path, Path], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_LOST", 0.3)
    monkeypatch.setattr(lock, "_SETTLE", 0.05)
    waiting, going_on = folders
    bucket = f"{s3.bucket()}/run"
    keys = {"save": bucket, "async_save": True, "keep_last_n_checkpoints": 2}
    run_ranks(1, lambda: run(waiting))
    with pytest.raises(RankError, match="died"):
        run_ranks(1, lambda: run_killed(going_on, 5, **keys))
    left = list(whole_steps(storage_of(bucket)))
    assert left
    assert set(left) <= {2, 4}
    assert run_ranks(1, lambda: run(going_on, **keys)) == [6]
    assert losses(waiting) == losses(going_on)
    assert_same(str(waiting / "checkpoints"), bucket, 6)
    root = storage_of(bucket)
    assert (root.folders(), root.files()) == (["global_step4", "global_step6"], ["latest"])
