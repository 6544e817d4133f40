"""A run that was stopped, killed or moved to another number of ranks is the run that never stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.engine.step import StepEngine
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from megatron.training.run import train
from tests.end_to_end.tiny import config, losses, tensors, write_corpus
from tests.ranks import RankError, run_ranks


def run(folder: Path, world_size: int = 1, **changes: Any) -> dict[str, int]:
    """Train the tiny run as one rank of `world_size`; returns its progress."""
    tiny = config(folder, world_size, **changes)
    sizes = tiny.parallel
    mesh = Mesh.create(sizes.model_parallel_size, max(1, sizes.pipe_parallel_size), sizes.context_parallel_size)
    return train(tiny, mesh).progress.as_dict()


def run_killed(folder: Path, at: int, **changes: Any) -> None:
    """Train, and die as by kill -9 within the step after `at` updates."""
    step: Callable[..., Any] = StepEngine.queue_step

    def dying_step(self: StepEngine, batches: Any, iteration: int, *settings: Any) -> Any:
        if iteration == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batches, iteration, *settings)

    StepEngine.queue_step = dying_step  # type: ignore[method-assign]
    run(folder, **changes)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("whole", "broken"):
        write_corpus(tmp_path / name / "corpus")
    return tmp_path / "whole", tmp_path / "broken"


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "hidden_dropout": 0.0, "attention_dropout": 0.0}])
def test_killed_run_continues_bitwise(folders: tuple[Path, Path], changes: dict[str, Any]) -> None:
    whole, broken = folders
    run_ranks(1, lambda: run(whole, **changes))
    with pytest.raises(RankError, match="died"):
        run_ranks(1, lambda: run_killed(broken, 5, **changes))
    assert find_checkpoint(broken / "checkpoints").name == "global_step4"
    [progress] = run_ranks(1, lambda: run(broken, **changes))
    assert progress["iteration"] == 8
    assert progress["consumed_samples"] == 8 * 4
    assert losses(whole) == losses(broken)
    assert losses(whole, "validation") == losses(broken, "validation")
    expected, found = tensors(whole), tensors(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_resume_on_two_ranks_and_another_stage_has_the_same_losses(folders: tuple[Path, Path]) -> None:
    whole, broken = folders
    changes = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    run_ranks(1, lambda: run(whole, **changes))
    run_ranks(1, lambda: run(broken, exit_interval=4, **changes))
    moved = {"gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3}}
    run_ranks(2, lambda: run(broken, 2, **{**changes, **moved}))
    assert losses(broken).keys() == losses(whole).keys()
    for iteration, loss in losses(whole).items():
        assert losses(broken)[iteration] == pytest.approx(loss, rel=1e-6)


def test_a_checkpoint_keeps_the_files_that_the_user_wrote(folders: tuple[Path, Path]) -> None:
    whole, _ = folders
    files = {"mine.yml": "# mine\nseed: 1234\n"}
    run_ranks(1, lambda: train(config(whole, train_iters=1), Mesh.create(), files).progress.as_dict())
    folder = find_checkpoint(whole / "checkpoints")
    assert folder.read("configs/mine.yml").decode() == files["mine.yml"]


def test_a_finished_run_says_so_and_another_order_of_samples_is_a_warning(
    folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    whole, _ = folders
    run_ranks(1, lambda: run(whole, train_iters=1))
    run_ranks(1, lambda: run(whole, train_iters=1, seed=5))
    said = capfd.readouterr().err
    assert "nothing left to train: the checkpoint is of iteration 1 and train_iters is 1" in said
    assert "changed since that checkpoint: seed: 1234 -> 5" in said
    assert "The training samples come in another order" in said


def test_resume_with_divided_sequences_has_the_same_losses(folders: tuple[Path, Path]) -> None:
    whole, broken = folders
    changes = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "char_level_ppl": True}
    run_ranks(1, lambda: run(whole, **changes))
    run_ranks(2, lambda: run(broken, 2, exit_interval=4, **changes, context_parallel_size=2))
    moved = {"context_parallel_size": 4, "context_parallel_method": "all_to_all", "zero_optimization": {"stage": 0}}
    run_ranks(4, lambda: run(broken, 4, exit_interval=6, **changes, **moved))
    run_ranks(1, lambda: run(broken, **changes))
    for kind in ("step", "validation"):
        assert losses(broken, kind).keys() == losses(whole, kind).keys()
        for iteration, loss in losses(whole, kind).items():
            assert losses(broken, kind)[iteration] == pytest.approx(loss, rel=1e-6)


def test_nothing_is_overwritten_without_being_asked(folders: tuple[Path, Path]) -> None:
    whole, _ = folders
    run_ranks(1, lambda: run(whole, train_iters=2))
    before = tensors(whole)
    with pytest.raises(CheckpointError, match=r"already holds checkpoints, up to iteration 2.*resume: auto"):
        run_ranks(1, lambda: run(whole, train_iters=2, resume="never"))
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(whole).items())


def test_finetune_takes_the_weights_and_begins_at_zero(folders: tuple[Path, Path]) -> None:
    whole, broken = folders
    run_ranks(1, lambda: run(whole, train_iters=4))
    source = str(whole / "checkpoints")
    changes = {"load": source, "finetune": True, "train_iters": 1, "optimizer": {"type": "sgd", "params": {"lr": 1e-9}}}
    [progress] = run_ranks(1, lambda: run(broken, weight_decay=0.0, lr_decay_style="constant", **changes))
    assert progress["iteration"] == 1
    trained = CheckpointReader(find_checkpoint(whole / "checkpoints"))
    for (kind, name), tensor in tensors(broken).items():
        if kind == "weight":
            torch.testing.assert_close(tensor, trained.read(name), rtol=0, atol=1e-6)


def test_load_that_finds_nothing_stops(folders: tuple[Path, Path]) -> None:
    whole, _ = folders
    with pytest.raises(CheckpointError, match="There is no such folder"):
        run_ranks(1, lambda: run(whole, load=str(whole / "nowhere")))


def run_stopped(folder: Path, at: int, **changes: Any) -> dict[str, int]:
    """Train on two ranks, of which the second gets a SIGTERM in the step after `at` updates."""
    step: Callable[..., Any] = StepEngine.queue_step

    def stopped_step(self: StepEngine, batches: Any, iteration: int, *settings: Any) -> Any:
        if iteration == at and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches, iteration, *settings)

    StepEngine.queue_step = stopped_step  # type: ignore[method-assign]
    progress = run(folder, 2, **changes)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return progress


def test_a_sigterm_on_one_rank_ends_all_with_a_checkpoint(folders: tuple[Path, Path]) -> None:
    whole, broken = folders
    run_ranks(2, lambda: run(whole, 2, checkpoint_factor=100))
    stopped = run_ranks(2, lambda: run_stopped(broken, 2, checkpoint_factor=100))
    assert [progress["iteration"] for progress in stopped] == [3, 3]
    assert [path.name for path in (broken / "checkpoints").glob("global_step*")] == ["global_step3"]
    run_ranks(2, lambda: run(broken, 2, checkpoint_factor=100))
    expected, found = tensors(whole), tensors(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("changes", [{}, {"zero_optimization": {"stage": 0}, "precision": "bf16"}])
def test_results_that_are_read_late_change_nothing(folders: tuple[Path, Path], changes: dict[str, Any]) -> None:
    """As on a GPU: two steps are queued before the result of one is read. Metrics and checkpoints are the same."""
    from megatron.monitor.metrics import read_metrics
    from megatron.training import run as assembly

    def run_late(folder: Path) -> dict[str, int]:
        assembly.steps_late = lambda device: 2
        return run(folder, train_iters=7, exit_interval=7, **changes)

    whole, broken = folders
    assert run_ranks(1, lambda: run(whole, train_iters=7, **changes)) == run_ranks(1, lambda: run_late(broken))
    here, there = (read_metrics(folder / "runs" / "tiny" / "metrics.jsonl") for folder in folders)
    clocks = {"time", "seconds", "tokens_per_second", "seconds_since_launch", "folder"}
    plain = [[{k: v for k, v in record.items() if k not in clocks} for record in records] for records in (here, there)]
    assert plain[0] == plain[1]
    assert [record["iteration"] for record in here if record["event"] == "step"] == list(range(1, 8))
    expected, found = tensors(whole), tensors(broken)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_sigterm_that_is_told_late_ends_all_ranks_at_the_same_step(folders: tuple[Path, Path]) -> None:
    def run_late(folder: Path) -> dict[str, int]:
        from megatron.training import run as assembly

        assembly.steps_late = lambda device: 2
        return run_stopped(folder, 1, checkpoint_factor=100, eval_iters=0, eval_interval=100)

    stopped = run_ranks(2, lambda: run_late(folders[0]))
    assert [progress["iteration"] for progress in stopped] == [4, 4]  # asked in step 2, read after step 4
    assert stopped[0]["consumed_tokens"] == 4 * 8 * 32
