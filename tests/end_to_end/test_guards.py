"""Runs whose loss spikes or is not finite: what they leave out, what they report, and that a resume does the same."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.load import find_checkpoint
from megatron.data.loaders import BatchLoader
from megatron.engine.base import StepResult
from megatron.engine.local import LocalEngine
from megatron.engine.step import StepEngine
from megatron.errors import EngineError
from megatron.monitor.build import Monitor
from megatron.monitor.metrics import read_metrics
from megatron.parallel.mesh import Mesh
from megatron.training import run as training_run
from megatron.training.persistence import Keeper
from megatron.training.run import train
from tests.end_to_end.tiny import config, losses, tensors, write_corpus
from tests.ranks import RankError, run_ranks

LENGTH, SPIKE, SAMPLES = 18, 14, 4
SETTINGS: dict[str, Any] = {
    "train_iters": LENGTH, "checkpoint_factor": 4, "eval_iters": 0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
GUARD = {"window": 20, "warmup_steps": 8, "loss_deviations": 2.0}  # the first steps fall steeply
POISON = (SPIKE - 1) * SAMPLES


def guarded(action: str, **entries: Any) -> dict[str, Any]:
    return {**SETTINGS, "spike_guard": {"action": action, **GUARD, **entries}}


def poison(*positions: int) -> None:
    """In this process the labels of the steps that begin there are bytes that text does not have."""
    read: Callable[..., Any] = BatchLoader.read_step

    def poisoned(self: BatchLoader, consumed_samples: int) -> Any:
        batches = read(self, consumed_samples)
        if consumed_samples not in positions:
            return batches
        return [replace(batch, labels=255 - batch.labels % 8) for batch in batches]

    BatchLoader.read_step = poisoned  # type: ignore[method-assign]


def before_step(action: Callable[[StepEngine, int], None]) -> None:
    """In this process `action(engine, iteration)` comes before each step, examined ones included."""
    queue: Callable[..., Any] = StepEngine.queue_step

    def acting(self: StepEngine, batches: Any, iteration: int, *settings: Any, **named: Any) -> Any:
        action(self, iteration)
        return queue(self, batches, iteration, *settings, **named)

    StepEngine.queue_step = acting  # type: ignore[method-assign]


def die_at(iteration: int) -> None:
    before_step(lambda _, now: os.kill(os.getpid(), signal.SIGKILL) if now == iteration else None)


def run(folder: Path, world_size: int = 1, at: tuple[int, ...] = (POISON,), **changes: Any) -> dict[str, Any]:
    poison(*at)
    Monitor.plot = lambda self: None  # type: ignore[method-assign]
    tiny = config(folder, world_size, **changes)
    sizes = tiny.parallel
    mesh = Mesh.create(sizes.model_parallel_size, max(1, sizes.pipe_parallel_size), sizes.context_parallel_size)
    return train(tiny, mesh).progress.as_dict()


def same(first: Path, second: Path) -> bool:
    expected, found = tensors(first), tensors(second)
    return expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "runs" / "tiny" / "metrics.jsonl") if r["event"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Returns folder and progress of the run of an action that nobody stopped; each is made once."""

    @cache
    def make(action: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(action)
        write_corpus(folder / "corpus")
        return folder, run_ranks(1, lambda: run(folder, **guarded(action)))[0]

    return make


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("first", "second"):
        write_corpus(tmp_path / name / "corpus")
    return tmp_path / "first", tmp_path / "second"


def left_out_by_hand(iterations: set[int]) -> None:
    """In this process the engine is not even asked to do these steps."""
    queue: Callable[..., Any] = StepEngine.queue_step

    class Nothing:
        def read(self) -> StepResult:
            return StepResult(math.nan, 0, 0.0, math.nan, math.nan, skipped=True)

    def choosing(self: StepEngine, batches: Any, iteration: int, *settings: Any) -> Any:
        return Nothing() if iteration in iterations else queue(self, batches, iteration, *settings)

    StepEngine.queue_step = choosing  # type: ignore[method-assign]


def test_skipping_is_leaving_the_step_out_by_hand(folders: tuple[Path, Path]) -> None:
    guard, hand = folders
    precision = "bf16"

    def by_hand() -> Any:
        left_out_by_hand({SPIKE - 1})
        return run(hand, at=(), **SETTINGS, precision=precision)

    [progress] = run_ranks(1, lambda: run(guard, **guarded("skip"), precision=precision))
    run_ranks(1, by_hand)
    assert same(guard, hand)
    assert progress["guard"]["left_out"] == [
        {"iteration": SPIKE, "begin": POISON, "end": POISON + SAMPLES, "reason": "spike", "back_to": -1}
    ]
    assert (progress["iteration"], progress["consumed_samples"]) == (LENGTH, LENGTH * SAMPLES)
    [event] = events(guard, "spike")
    assert event["iteration"] == SPIKE
    assert event["loss"] > event["loss_limit"]
    run_ranks(1, lambda: run(hand, **{**SETTINGS, "save": str(hand / "other")}, precision=precision))
    assert losses(hand)[SPIKE + 1] != losses(guard)[SPIKE + 1], "without the guard the spike has an effect"


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("killed_at", [SPIKE - 1, SPIKE + 3])
def test_a_resumed_run_decides_as_the_one_that_never_stopped(
    folders: tuple[Path, Path], whole: Any, action: str, killed_at: int
) -> None:
    """Killed before the spike, so that the decision is made again, and behind it, where it is known."""
    (unbroken, expected), broken = whole(action), folders[0]

    def killed() -> None:
        die_at(killed_at)
        run(broken, **guarded(action))

    with pytest.raises(RankError, match="died"):
        run_ranks(1, killed)
    [progress] = run_ranks(1, lambda: run(broken, **guarded(action)))
    assert progress == expected
    assert losses(broken) == losses(unbroken)
    assert same(unbroken, broken)


@pytest.mark.parametrize("checkpoint_factor", [6, 100])
def test_results_that_are_read_late_change_no_decision(folders: tuple[Path, Path], checkpoint_factor: int) -> None:
    """As on a GPU: two more steps are queued before a spike is known. A rollback drops them, unless it has no
    checkpoint yet, and skips."""
    at_once, late = folders
    keys = {**guarded("rollback"), "checkpoint_factor": checkpoint_factor, "eval_interval": 100}  # read early for none

    def read_late() -> dict[str, Any]:
        training_run.steps_late = lambda device: 2
        return run(late, **keys)

    [expected] = run_ranks(1, lambda: run(at_once, **keys))
    [found] = run_ranks(1, read_late)
    assert found == expected
    assert same(at_once, late)


def test_a_rollback_is_the_checkpoint_with_the_samples_left_out(folders: tuple[Path, Path], whole: Any) -> None:
    (guard, progress), hand = whole("rollback"), folders[0]
    back_to, end = 12, SPIKE * SAMPLES
    assert progress["guard"]["left_out"] == [
        {"iteration": SPIKE, "begin": back_to * SAMPLES, "end": end, "reason": "rollback", "back_to": back_to}
    ]
    assert progress["iteration"] == LENGTH
    assert progress["consumed_samples"] == LENGTH * SAMPLES + end - back_to * SAMPLES

    def to_the_checkpoint() -> None:
        die_at(back_to)
        run(hand, at=(), **SETTINGS)

    def behind_the_samples() -> dict[str, Any]:
        restore: Callable[..., Any] = Keeper.restore

        def moved(self: Keeper, *settings: Any) -> Any:
            return replace(restore(self, *settings), consumed_samples=end)

        Keeper.restore = moved  # type: ignore[method-assign]
        return run(hand, at=(), **SETTINGS)

    with pytest.raises(RankError, match="died"):
        run_ranks(1, to_the_checkpoint)
    run_ranks(1, behind_the_samples)
    assert same(guard, hand)
    assert losses(guard) == losses(hand)
    assert [record["back_to"] for record in events(guard, "rollback")] == [back_to]
    assert len(events(guard, "spike")) == 1


def test_stopping_saves_the_state_without_the_spike(folders: tuple[Path, Path], whole: Any) -> None:
    stopped = folders[0]
    with pytest.raises(EngineError, match=rf"iteration {SPIKE} is a spike: the loss .* is above its limit"):
        run_ranks(1, lambda: run(stopped, **guarded("stop")))
    assert find_checkpoint(stopped / "checkpoints").name == f"global_step{SPIKE}"
    run_ranks(1, lambda: run(stopped, **guarded("stop")))
    assert same(stopped, whole("skip")[0])


def test_ranks_and_topologies_decide_alike(folders: tuple[Path, Path]) -> None:
    """Two ranks under ZeRO 1, killed behind the spike, continued as a pipeline."""
    one, many = folders
    limits = {"grad_norm_multiple": 20.0}
    [expected] = run_ranks(1, lambda: run(one, **guarded("skip", **limits)))

    def killed() -> None:
        die_at(SPIKE + 3)
        run(many, 2, **guarded("skip", **limits), gradient_accumulation_steps=1)

    with pytest.raises(RankError, match="died"):
        run_ranks(2, killed)
    both = run_ranks(2, lambda: run(many, 2, **guarded("skip", **limits), pipe_parallel_size=2))
    assert both[0] == both[1]
    assert both[0]["guard"]["left_out"] == expected["guard"]["left_out"]
    first, second = losses(one), losses(many)
    assert first.keys() == second.keys()
    assert [second[step] for step in first] == pytest.approx(list(first.values()), rel=1e-5)


def test_a_loss_that_stays_high_ends_the_run(folders: tuple[Path, Path]) -> None:
    at = tuple(range(POISON, LENGTH * SAMPLES, SAMPLES))
    with pytest.raises(EngineError, match=r"3 steps in a row, the last of them 16, are spikes"):
        run_ranks(1, lambda: run(folders[0], at=at, **guarded("skip", most_in_a_row=2)))
    with pytest.raises(EngineError, match=r"went back to the checkpoint of iteration 12 2 times"):
        run_ranks(1, lambda: run(folders[1], at=at, **guarded("rollback", most_in_a_row=2)))


def spoil(iterations: range) -> None:
    """In this process rank 0's activations in layers.1 are not finite in these steps."""
    is_on = [False]

    def switch(engine: StepEngine, iteration: int) -> None:
        module = engine.model.get_submodule("layers.1.mlp")
        if not module._forward_pre_hooks:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (math.nan if is_on[0] else 1.0),))
        is_on[0] = iteration in iterations and engine._mesh.world.rank == 0

    before_step(switch)


def test_a_step_that_is_not_finite_is_reported(folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """On one of two ranks, twice; the run goes on, and the reports name layer, samples and documents."""

    def spoilt() -> dict[str, Any]:
        spoil(range(5, 7))
        return run(folders[0], 2, at=(), **{**SETTINGS, "train_iters": 8}, gradient_accumulation_steps=1)

    progress = run_ranks(2, spoilt)[0]
    assert progress["skipped_iterations"] == 2
    assert [each["iteration"] for each in progress["guard"]["left_out"]] == [6, 7]
    reports = sorted((folders[0] / "runs/tiny/not_finite").iterdir())
    assert [path.name for path in reports] == ["step_00000006.json", "step_00000007.json"]
    report = json.loads(reports[0].read_text())
    assert report["loss"] == "nan"
    assert report["first"]["layer"] == "layers.1"
    assert (report["first"]["kind"], report["first"]["rank"], report["first"]["micro_batch"]) == ("activation", 0, 0)
    assert list(report["grad_norm_per_layer"]) == ["embedding", "layers.0", "layers.1", "final_norm", "head"]
    first, second = report["micro_batches"]
    assert (first["samples"], second["samples"]) == ([20, 21], [22, 23])
    assert (first["loss"], math.isfinite(second["loss"])) == ("nan", True)
    assert all(origin["documents"] for origin in first["documents"])
    output = capfd.readouterr()
    assert "It begins in layers.1: the input of layers.1.mlp" in output.out + output.err
    assert str(reports[0]) in output.out + output.err
    assert len(events(folders[0], "not_finite")) == 2


def test_too_many_in_a_row_end_the_run(folders: tuple[Path, Path]) -> None:
    def spoilt() -> None:
        spoil(range(5, 100))
        run(folders[0], at=(), **SETTINGS, most_not_finite=6)

    with pytest.raises(
        EngineError, match="7 steps in a row, the last of them 12, have a loss or a gradient that is not"
    ):
        run_ranks(1, spoilt)
    assert len(list((folders[0] / "runs/tiny/not_finite").iterdir())) == 5


@pytest.mark.parametrize("keys", [{"precision": "fp16"}, {"optimizer_in_backward": True, "gradient_clipping": 0.0}])
def test_a_run_that_cannot_go_on_is_reported(folders: tuple[Path, Path], keys: dict[str, Any]) -> None:
    """fp16 at the end of its scale, whose ordinary overflows are no event, and weights that have changed already."""
    local = {"zero_optimization": {"stage": 0}, "gradient_accumulation_steps": 1}
    fp16 = {"fp16": {"initial_scale_power": 2, "hysteresis": 1}} if "precision" in keys else {}

    def overflowing() -> None:
        spoil_gradients(range(3, 100))
        run(folders[0], at=(), **{**SETTINGS, **local, **fp16, **keys})

    with pytest.raises(EngineError, match=r"the run has diverged|cannot be skipped"):
        run_ranks(1, overflowing)
    [report] = (folders[0] / "runs/tiny/not_finite").iterdir()
    assert json.loads(report.read_text())["first"]["kind"] == "gradient"
    assert json.loads(report.read_text())["first"]["layer"] == "layers.1"


def spoil_gradients(iterations: range) -> None:
    """In this process the gradient of what layers.1.mlp returns is not finite in these steps."""
    is_on = [False]

    def spoilt(_module: Any, _inputs: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output) + 0.0
        if is_on[0] and first.requires_grad:
            first.register_hook(lambda gradient: gradient * math.inf)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def switch(engine: StepEngine, iteration: int) -> None:
        module = engine.model.get_submodule("layers.1.mlp")
        if not module._forward_hooks:
            module.register_forward_hook(spoilt)
        is_on[0] = iteration in iterations

    before_step(switch)


def test_overwritten_weights_end_the_run_and_others_do_not(folders: tuple[Path, Path]) -> None:
    """A run of 60 steps is continued: by an optimizer whose masters are initial weights, and as it should be."""
    first, second = folders
    keys = {**SETTINGS, "precision": "bf16", "train_iters": 60, "checkpoint_factor": 60, "lr_decay_style": "constant"}
    run_ranks(1, lambda: run(first, at=(), **keys))
    loaded = {**keys, "load": str(first / "checkpoints"), "finetune": True, "train_iters": 6, "resume": "never"}

    def overwritten() -> None:
        load: Callable[..., Any] = LocalEngine.load_state

        def forgetting(self: LocalEngine, *settings: Any, **named: Any) -> None:
            masters = [master.detach().clone() for master in self._masters.values()]
            load(self, *settings, **named)
            torch.manual_seed(1)
            for master, old in zip(self._masters.values(), masters, strict=True):
                master.data.copy_(torch.randn_like(old) * 0.02 if old.ndim > 1 else old)

        LocalEngine.load_state = forgetting  # type: ignore[method-assign]
        run(second, at=(), **loaded)

    with pytest.raises(EngineError, match=r"the loaded weights were probably overwritten"):
        run_ranks(1, overwritten)
    assert len(losses(second)) == 3
    [progress] = run_ranks(1, lambda: run(second, at=(), **loaded))
    assert progress["iteration"] == 6
