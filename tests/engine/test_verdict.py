"""A step beyond its limits, or whose loss is not finite, changes nothing: in every engine, on all ranks alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron.engine.base import NO_LIMITS, NOTHING, Limits
from megatron.engine.build import build_engine
from megatron.errors import EngineError
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.engine.test_no_waiting import reads
from tests.ranks import preload, run_ranks

preload()
from deepspeed.accelerator import get_accelerator  # noqa: E402

from tests.engine import tiny  # noqa: E402
from tests.parallel import matrix  # noqa: E402


def tiny_engine(world_size: int, **keys: Any) -> tuple[Any, Any]:
    type(get_accelerator()).is_fp16_supported = lambda self: True  # DeepSpeed asks for fp16 instructions on the CPU
    fp16 = {"fp16": {"initial_scale_power": 8}} if keys.get("precision") == "fp16" else {}
    config = tiny.config(world_size, gradient_accumulation_steps=2, **fp16, **keys)
    return tiny.make_engine(config), config


def state_of(engine: Any) -> list[tuple]:
    return [piece for piece in tiny.full_state(engine) if piece[1] != "loss_scaler"]


def same(first: list[tuple], second: list[tuple]) -> bool:
    return all(torch.equal(a[-1], b[-1]) for a, b in zip(first, second, strict=True))


PRECISIONS = {0: ("fp32", "bf16", "fp16"), 1: ("fp32", "bf16", "fp16"), 2: ("bf16",), 3: ("bf16", "fp16")}
EACH = [(stage, precision) for stage, precisions in PRECISIONS.items() for precision in precisions]
"""ZeRO 1 and 2 are one optimizer of DeepSpeed's, but for bf16 under ZeRO 1."""


@pytest.mark.parametrize(("stage", "precision"), EACH)
def test_a_step_beyond_a_limit_is_left_out(stage: int, precision: str) -> None:
    """Each limit by itself, of the value itself (which passes) and the number below it (which does not)."""

    def run() -> list[Any]:
        engine, config = tiny_engine(2, stage=stage, precision=precision)
        batches = tiny.micro_batches(config, 0, engine._mesh)
        start, found = state_of(engine), []
        known = engine.queue_step(batches, 0, limits=NOTHING).read()
        for limits in (
            Limits(loss=math.nextafter(known.loss, 0)),
            Limits(grad_norm=math.nextafter(known.grad_norm, 0)),
        ):
            result = engine.queue_step(batches, 0, limits=limits).read()
            found.append((result, same(start, state_of(engine))))
        fits = Limits(known.loss, known.grad_norm * (1 + 1e-6))  # DeepSpeed's norm is fp32, and ours is not scaled
        result = engine.queue_step(batches, 0, limits=fits).read()
        return [known, *found, (result, same(start, state_of(engine)))]

    known, *found = run_ranks(2, run)[0]
    assert known.spiked
    for result, is_unchanged in found[:2]:
        assert (result.skipped, result.spiked, result.not_finite, is_unchanged) == (True, True, False, True)
        assert (result.loss, result.grad_norm, result.loss_scale) == (known.loss, known.grad_norm, known.loss_scale)
    result, is_unchanged = found[2]
    assert (result.skipped, result.spiked, is_unchanged) == (False, False, False)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_was_left_out_leaves_no_trace(stage: int) -> None:
    """The steps after it are those of a run in which nobody computed it, bit by bit."""

    def run(with_spike: bool) -> list[Any]:
        engine, config = tiny_engine(1, stage=stage, precision="bf16")
        for iteration in range(4):
            batches = tiny.micro_batches(config, iteration, engine._mesh)
            if iteration != 2:
                engine.queue_step(batches, iteration).read()
            elif with_spike:
                assert engine.queue_step(batches, iteration, limits=Limits(loss=0.5)).read().spiked
        return state_of(engine)

    with_spike, without = (run_ranks(1, lambda spike=spike: run(spike))[0] for spike in (True, False))
    assert same(with_spike, without)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is(stage: int) -> None:
    def run() -> tuple:
        engine, config = tiny_engine(2, stage=stage)
        objective, mesh = engine._objective, engine._mesh

        def broken(model: Any, batch: Any) -> Any:
            total, tokens = objective(model, batch)
            return total + (math.inf if mesh.world.rank else 0.0), tokens  # adds nothing to the gradient

        engine._objective = broken
        start = state_of(engine)
        return tiny.train(engine, config, 0, 1)[0], same(start, state_of(engine))

    for result, is_unchanged in run_ranks(2, run):
        assert (result.skipped, result.not_finite, result.spiked, is_unchanged) == (True, True, False, True)
        assert math.isfinite(result.grad_norm)


@pytest.mark.parametrize("keys", [{"pipe_parallel_size": 2}, {"model_parallel_size": 2}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pipelines_and_tensor_parallel_ranks_leave_it_out_together(keys: dict[str, Any], precision: str) -> None:
    def run() -> tuple:
        config = matrix.make_config({"precision": precision, **keys}, 2)
        mesh = matrix.make_mesh(config)
        engine = build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective())
        batches = [matrix.micro_batches(config, batch, mesh) for batch in matrix.make_batches(config)]
        start = state_of(engine)
        left_out = engine.queue_step(batches[0], 0, limits=Limits(grad_norm=1e-6)).read()
        unchanged = same(start, state_of(engine))
        applied = engine.queue_step(batches[0], 0).read()
        return left_out, unchanged, applied, same(start, state_of(engine))

    for left_out, unchanged, applied, is_same in run_ranks(2, run):
        assert (left_out.spiked, unchanged, applied.skipped, is_same) == (True, True, False, False)
        assert (left_out.loss, left_out.grad_norm) == (applied.loss, applied.grad_norm)


def test_the_choice_reads_nothing_from_the_device() -> None:
    def run() -> Any:
        engine, config = tiny_engine(2, precision="bf16")
        batches = tiny.micro_batches(config, 0, engine._mesh)
        pending: list[Any] = []
        found = reads(lambda: pending.append(engine.queue_step(batches, 0, limits=Limits(0.1, 0.1))))
        return found, pending[0].read().spiked

    for found, spiked in run_ranks(2, run):
        assert not found
        assert spiked


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_that_decide_otherwise_end_the_run(stage: int) -> None:
    def run() -> None:
        engine, config = tiny_engine(2, stage=stage)
        limits = Limits(loss=0.5) if engine._mesh.world.rank and not stage else NO_LIMITS
        batches = tiny.micro_batches(config, 0, engine._mesh)
        engine.queue_step(batches, 0, limits=limits).read()
        if stage:  # its ranks would wait for each other
            engine._last_refused = float(engine._mesh.world.rank)
        engine.queue_step(batches, 1).read()

    with pytest.raises(EngineError, match="1 of 2 ranks left it out, and the others applied it"):
        run_ranks(2, run)
