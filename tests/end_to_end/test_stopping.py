"""A run that was stopped by a signal, in whatever phase and on whichever ranks, goes on as if it had never been."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.load import CheckpointReader
from megatron.training import run as assembly
from megatron.training.stop import Outcome
from tests.end_to_end.stopping import run
from tests.end_to_end.tiny import losses, tensors, write_corpus
from tests.ranks import run_ranks

QUIET = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "two": (2, {"async_save": True}),
    "pipeline": (2, {"pipe_parallel_size": 2, **QUIET}),
    "four": (4, {"model_parallel_size": 2, "zero_optimization": {"stage": 3}, **QUIET}),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Layout -> the folder of its run that nothing stopped."""

    @cache
    def train(layout: str) -> Path:
        world_size, changes = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("whole")
        run_ranks(world_size, lambda: run(folder, world_size, data_path=str(corpus), **changes))
        return folder

    return train


def stop(folder: Path, layout: str, phase: str, ranks: tuple[int, ...], **changes: Any) -> Outcome:
    """Stop a run in a phase, by a signal to these ranks; return what every rank returned alike."""
    world_size, keys = LAYOUTS[layout]
    outcomes = run_ranks(world_size, lambda: run(folder, world_size, phase, ranks, **keys, **changes))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]


# layout, phase, who gets the signal, the step after which the run stops, whether it owes a validation
CASES: list[tuple[str, str, tuple[int, ...], int, bool]] = [
    ("one", "the first validation", (0,), 0, True),
    ("one", "the end of a validation", (0,), 4, False),
    ("one", "the last validation", (0,), 6, True),
    ("one", "the test", (0,), 6, False),
    ("two", "an accumulation", (1,), 2, False),
    ("two", "a save", (0, 1), 6, True),
    ("pipeline", "an accumulation", (1,), 2, False),
    ("four", "a validation", (3,), 3, True),
]


@pytest.mark.parametrize(("layout", "phase", "ranks", "at", "owes"), CASES)
def test_a_stopped_run_goes_on_bitwise(
    whole: Any, corpus: Path, tmp_path: Path, layout: str, phase: str, ranks: tuple[int, ...], at: int, owes: bool
) -> None:
    expected = whole(layout)
    outcome = stop(tmp_path, layout, phase, ranks, data_path=str(corpus))
    assert outcome.stopped is not None
    assert outcome.stopped.exit_code == 75
    assert (outcome.progress.iteration, outcome.progress.owes_validation) == (at, owes)
    world_size, changes = LAYOUTS[layout]
    run_ranks(world_size, lambda: run(tmp_path, world_size, data_path=str(corpus), **changes))
    for event in ("step", "validation", "test"):
        assert losses(tmp_path, event) == losses(expected, event)
    events = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    steps = [event["iteration"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, 7))
    validated = [event["iteration"] for event in events if event["event"] == "validation"]
    assert validated == [0, 3, 6]
    found, wanted = tensors(tmp_path), tensors(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("late", "expected"), [(0, [1, 2, 3, 4, 5, 6]), (2, [3, 6])])
def test_the_clock_of_rank_0_saves_on_all_ranks(corpus: Path, tmp_path: Path, late: int, expected: list[int]) -> None:
    """A save is due at each step; where results are read late, when the first of them is read, with all before it."""

    def train() -> Outcome:
        assembly.steps_late = lambda device: late
        keys = {"checkpoint_factor": None, "checkpoint_interval_minutes": 1e-9, "eval_iters": 0, "eval_interval": 100}
        return run(tmp_path, 2, data_path=str(corpus), **keys)

    assert all(outcome.stopped is None for outcome in run_ranks(2, train))
    saved = sorted((tmp_path / "checkpoints").glob("global_step*"))
    assert [path.name for path in saved] == [f"global_step{iteration}" for iteration in expected]
    counted = [CheckpointReader(path).manifest.progress["consumed_tokens"] for path in saved]
    assert counted == [iteration * 8 * 32 for iteration in expected]
