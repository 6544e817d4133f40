"""fp16: the loss scale finds its place, overflowing steps are skipped and reported, and its state is saved."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron.engine.loss_scale import LossScale
from megatron.errors import EngineError
from tests.ranks import preload, run_ranks

preload()
from deepspeed import init_distributed  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # noqa: E402

from tests.engine import tiny  # noqa: E402
from tests.engine.sources import Tensors  # noqa: E402


def fp16_engine(world_size: int, stage: int, **fp16):
    type(get_accelerator()).is_fp16_supported = lambda self: True  # DeepSpeed asks for fp16 instructions on the CPU
    config = tiny.config(world_size, stage=stage, precision="fp16", gradient_accumulation_steps=2, fp16=fp16)
    return tiny.make_engine(config), config


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_follows_fp32(stage, world_size):
    def run() -> list:
        engine, config = fp16_engine(world_size, stage, initial_scale_power=8)
        results = tiny.train(engine, config, 0, 4)
        engine.check_masters()
        assert engine.read_back()["precision of accumulation"] == "fp32"
        return results

    config = tiny.config(world_size, gradient_accumulation_steps=2)
    losses, gradients, _ = tiny.reference(config, 4)
    for results in run_ranks(world_size, run):
        assert not any(result.skipped for result in results)
        assert {result.loss_scale for result in results} == {256.0}
        assert [result.loss for result in results] == pytest.approx(losses, rel=2e-3)
        assert [result.grad_norm for result in results] == pytest.approx([norm for norm, _ in gradients], rel=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_skips_the_step_and_lowers_the_scale(stage):
    def run() -> tuple:
        engine, config = fp16_engine(2, stage, initial_scale_power=24, hysteresis=1, loss_scale_window=2)
        start = tiny.full_state(engine)
        first = tiny.train(engine, config, 0, 1)
        after_skip = tiny.full_state(engine)
        results = first + tiny.train(engine, config, 1, 14)
        saved = tiny.full_state(engine)
        return start, after_skip, saved, results, tiny.train(engine, config, 14, 16)

    ranks = run_ranks(2, run)
    start, after_skip, saved = (tiny.merge([rank[index] for rank in ranks]) for index in range(3))
    results, through = ranks[0][3], ranks[0][4]
    assert results[0].skipped
    assert results[0].grad_norm == float("inf")
    assert all(torch.equal(after_skip[key], tensor) for key, tensor in start.items() if key[1] != "loss_scaler")
    scales = [result.loss_scale for result in results]
    assert scales[0] == 2.0**24
    skipped = [result.skipped for result in results]
    assert not all(skipped), scales
    for index in range(len(scales) - 1):
        if skipped[index]:
            assert scales[index + 1] == scales[index] / 2
    assert any(after > before for before, after in pairwise(scales)), "it never rose again"

    def resume() -> list:
        engine, config = fp16_engine(2, stage, initial_scale_power=24, hysteresis=1, loss_scale_window=2)
        engine.load_state(Tensors(saved), with_optimizer=True)
        return tiny.train(engine, config, 14, 16)

    assert run_ranks(2, resume)[0] == through


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_that_raises_the_scale_has_the_whole_gradient(stage):
    """The optimizer's averages are those of a run whose scale stays."""

    def run(window: int) -> tuple:
        fp16 = {"initial_scale_power": 6, "loss_scale_window": window}
        config = tiny.config(1, stage=stage, precision="fp16", gradient_clipping=0.0, fp16=fp16)
        engine = tiny.make_engine(config)
        results = tiny.train(engine, config, 0, 5)
        averages = [piece[-1].flatten() for piece in tiny.full_state(engine) if piece[1] == "exp_avg"]
        return torch.cat(averages), [(result.loss_scale, result.grad_norm) for result in results]

    def both() -> tuple:
        return run(2), run(100)

    type(get_accelerator()).is_fp16_supported = lambda self: True
    (moving, steps), (staying, steady) = run_ranks(1, both)[0]
    assert [scale for scale, _ in steps] == [64.0, 64.0, 64.0, 128.0, 128.0]
    assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in steady], rel=1e-3)
    assert (moving - staying).norm() < 0.01 * staying.norm()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_that_overflows_at_the_smallest_scale_ends(stage):
    def run() -> None:
        engine, config = fp16_engine(1, stage, initial_scale_power=1, hysteresis=1)
        objective = engine._objective
        engine._objective = lambda model, batch: tuple(float("inf") * value for value in objective(model, batch))
        tiny.train(engine, config, 0, 4)

    with pytest.raises(EngineError, match=r"the gradient overflows even at fp16\.min_loss_scale"):
        run_ranks(1, run)


@pytest.mark.parametrize("consecutive", [False, True])
def test_our_scale_moves_as_deepspeeds_does(consecutive):
    settings = {"initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 2, "min_loss_scale": 1}
    ours = LossScale({**settings, "consecutive_hysteresis": consecutive})
    theirs = DynamicLossScaler(1024.0, 3, 1.0, 2, consecutive, dtype=torch.half)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        init_distributed("gloo", auto_mpi_discovery=False)
        for _ in range(300):
            overflow = bool(torch.rand((), generator=generator) < 0.15)
            ours.update(torch.tensor(overflow))
            theirs.update_scale(overflow)
            for field in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
                assert getattr(ours, field) == getattr(theirs, field), field

    run_ranks(1, run)


def test_a_fixed_scale_stays():
    scale = LossScale({"loss_scale": 128})
    scale.update(overflow=torch.tensor(True))
    assert (scale.cur_scale, scale.dynamic) == (128.0, False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped_in_every_precision(stage, precision):
    def run() -> tuple:
        config = tiny.config(2, stage=stage, precision=precision)
        engine = tiny.make_engine(config)
        start = tiny.full_state(engine)
        objective = engine._objective
        bad = float("nan") if engine._mesh.dp.rank else 1.0
        engine._objective = lambda model, batch: tuple(bad * value for value in objective(model, batch))
        (result,) = tiny.train(engine, config, 0, 1)
        return result, start, tiny.full_state(engine)

    ranks = run_ranks(2, run)
    start, end = (tiny.merge([rank[index] for rank in ranks]) for index in (1, 2))
    for result, _, _ in ranks:
        assert result.skipped
        assert result.grad_norm == float("inf")
    assert all(torch.equal(end[key], tensor) for key, tensor in start.items())
