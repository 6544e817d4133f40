"""Every ZeRO stage, precision, accumulation and number of ranks against one process's plain torch loop.

Compared are the unclipped gradient of every parameter, the norm before and after clipping, the loss of 5
steps, and the weights after them, on batches whose loss masks are ragged, so that no two micro-batches have the same
number of trained tokens.
"""

from __future__ import annotations

import pytest
import torch

from tests.ranks import preload, run_ranks

preload()
from tests.engine import tiny  # noqa: E402

STEPS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bf16 is as tight as fp32, because the reference rounds each micro-batch as the ranks do and sums are in fp32.
TOLERANCE = 2e-6
_references: dict[tuple, tuple] = {}


def reference(world_size: int, precision: str, accumulation: int) -> tuple:
    key = (world_size, precision, accumulation)
    if key not in _references:
        config = tiny.config(world_size, precision=precision, gradient_accumulation_steps=accumulation)
        _references[key] = tiny.reference(config, STEPS, DTYPES[precision])
    return _references[key]


def run(stage: int, precision: str, accumulation: int, world_size: int) -> tuple:
    config = tiny.config(world_size, stage=stage, precision=precision, gradient_accumulation_steps=accumulation)
    engine = tiny.make_engine(config)
    gradients = tiny.capture_gradients(engine)
    results = tiny.train(engine, config, 0, STEPS)
    engine.check_masters()
    return results, gradients, tiny.full_state(engine)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engine_equals_one_plain_process(stage, precision, accumulation, world_size):
    losses, gradients, weights = reference(world_size, precision, accumulation)
    ranks = run_ranks(world_size, run, stage, precision, accumulation, world_size)
    state = tiny.merge([pieces for _, _, pieces in ranks])
    kind = "weight" if precision == "fp32" else "master"
    for name, expected in weights.items():
        assert relative(state[name, kind], expected) < TOLERANCE, name
    for results, captured, _ in ranks:
        assert [result.loss for result in results] == pytest.approx(losses, rel=TOLERANCE)
        for result, ours, (norm, theirs) in zip(results, captured, gradients, strict=True):
            assert result.grad_norm == pytest.approx(norm, rel=TOLERANCE)
            assert norm > 0.3  # the clipping limit: every step of this test clips
            assert result.clipped_grad_norm == pytest.approx(0.3, rel=1e-5)
            assert not result.skipped
            assert ours.keys() == theirs.keys()
            for name, gradient in theirs.items():
                assert relative(ours[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_split_of_the_batch_does_not_matter(world_size):
    """One batch of 8 ragged sequences as 1, 2, 4 or 8 micro-batches: the same losses, norms and token counts."""

    def run_split(micro: int) -> list:
        accumulation = 8 // (micro * world_size)
        config = tiny.config(
            world_size, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation, stage=1
        )
        return tiny.train(tiny.make_engine(config), config, 0, 3)

    whole = tiny.config(1, train_micro_batch_size_per_gpu=8)
    (expected,) = run_ranks(1, lambda: tiny.train(tiny.make_engine(whole), whole, 0, 3))
    for micro in (1, 2, 4):
        for results in run_ranks(world_size, run_split, micro):
            for ours, theirs in zip(results, expected, strict=True):
                assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
                assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
                assert ours.num_tokens == theirs.num_tokens


def test_a_wrong_scale_would_be_seen():
    """The comparison can fail: a loss scaled by the accumulation, DeepSpeed's own habit, is far outside."""
    config = tiny.config(1, stage=1, gradient_accumulation_steps=4)
    (norm, _), *_ = reference(1, "fp32", 4)[1]

    def run_scaled() -> float:
        engine = tiny.make_engine(config)
        backward = engine._live.backward
        engine._live.backward = lambda loss, scale_wrt_gas: backward(loss, scale_wrt_gas=True)
        return tiny.train(engine, config, 0, 1)[0].grad_norm

    assert run_ranks(1, run_scaled)[0] == pytest.approx(norm / 4, rel=1e-5)


def test_evaluate_sums_over_ranks_and_changes_nothing():
    def run_evaluation(world_size: int, stage: int) -> tuple:
        config = tiny.config(world_size, stage=stage, gradient_accumulation_steps=8 // world_size // 2)
        engine = tiny.make_engine(config)
        batches = tiny.micro_batches(config, 0, engine._mesh)
        before = engine.evaluate(batches)[:2]
        results = tiny.train(engine, config, 0, 2)
        engine.evaluate(batches)
        return before, results + tiny.train(engine, config, 2, 3), engine.model.training

    ((expected, _, _),) = run_ranks(1, run_evaluation, 1, 0)
    losses = reference(1, "fp32", 4)[0]
    assert expected[0] / expected[1] == pytest.approx(losses[0], rel=1e-6)
    for stage in (1, 3):
        for (loss_sum, num_tokens), results, training in run_ranks(2, run_evaluation, 2, stage):
            assert loss_sum == pytest.approx(expected[0], rel=1e-6)
            assert num_tokens == expected[1]
            assert training
            assert [result.loss for result in results] == pytest.approx(losses[:3], rel=1e-6)


def test_a_step_without_trained_tokens_changes_no_number_to_nan():
    def run_masked() -> float:
        config = tiny.config(1)
        engine = tiny.make_engine(config)
        (batch,) = tiny.micro_batches(config, 0, engine._mesh)
        empty = tiny.Batch(batch.tokens, batch.labels, torch.zeros_like(batch.loss_mask))
        result = engine.train_step([empty], 0)
        assert (result.loss, result.num_tokens, result.grad_norm) == (0.0, 0, 0.0)
        return engine.train_step([batch], 1).loss

    assert run_ranks(1, run_masked)[0] == pytest.approx(4.0, abs=1.5)
