"""The step in one pass equals the step of separate passes: in state, in what it reports, and where it is skipped."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron.engine import local
from megatron.ops import adamw
from megatron.ops.choice import Choices, Situation
from megatron.optim.build import build_optimizer
from megatron.optim.one_pass import one_pass
from megatron.parallel.mesh import Mesh
from tests.ranks import preload, run_ranks

preload()
from tests.engine import tiny  # noqa: E402

SITUATION = Situation(torch.device("cpu"), torch.float32, tiny.HIDDEN)


FORMULAE = {"adamw_update_": adamw.adamw_update_reference_, "sum_of_squares": adamw.sum_of_squares}


def step_apart(optimizer: Optimizer, gradients: list[Tensor], coefficient: Tensor) -> None:
    """Clip, then call torch's AdamW; or leave the step out."""
    if math.isfinite(float(coefficient)):
        torch._foreach_mul_(gradients, coefficient)
        optimizer.step()


def run(way: str, world_size: int, steps: int, **keys: Any) -> tuple[list[Any], list[tuple]]:
    """Train and return results and state. way: "fused", what every run does; "formula", its formula in the place of
    the kernel; "apart", norm, clipping and update one after another, as optimizers other than AdamW have it."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "formula":
            patch.setattr(Choices, "get", lambda self, operation, otherwise: FORMULAE[operation])
        config = tiny.config(world_size, gradient_accumulation_steps=2, **keys)
        engine = tiny.make_engine(config)
    assert engine._one_pass is not None
    if way == "apart":
        engine._one_pass = None
        local.step_where = step_apart
    results = tiny.train(engine, config, 0, steps)
    engine.check_masters()
    return results, tiny.full_state(engine)


def compare(world_size: int, steps: int, **keys: Any) -> list[Any]:
    """Run all ways, compare, and return the results of a rank."""
    ones, *rest = (
        run_ranks(world_size, partial(run, **keys), way, world_size, steps) for way in ("apart", "fused", "formula")
    )
    for others in rest:
        # Masters that differ in their last digit round a few fp16 weights differently, of a loss that has few digits.
        _compare(ones, others, 1e-3 if keys.get("precision") == "fp16" else 1e-5)
    return ones[0][0]


def _compare(ones: list[Any], others: list[Any], tolerance: float) -> None:
    for one, other in zip(ones[0][0], others[0][0], strict=True):
        assert one.skipped == other.skipped
        assert one.loss_scale == other.loss_scale
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
    found, expected = (tiny.merge([rank[1] for rank in ranks]) for ranks in (ones, others))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        exact = tensor.dtype != torch.float32
        torch.testing.assert_close(
            found[key], tensor, rtol=2**-7 if exact else 1e-4, atol=tolerance / 10, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_pass_equals_separate_passes(precision: str, world_size: int) -> None:
    results = compare(world_size, 5, precision=precision)
    assert any(result.grad_norm > 0.3 for result in results), "nothing was clipped"


def test_without_clipping() -> None:
    compare(1, 3, gradient_clipping=0.0)


def test_fp16_steps_that_overflow_are_skipped_and_not_counted() -> None:
    results = compare(1, 12, precision="fp16", fp16={"initial_scale_power": 22, "hysteresis": 1})
    skipped = [result.skipped for result in results]
    assert any(skipped)
    assert not all(skipped)
    assert all(math.isinf(result.grad_norm) == result.skipped for result in results)


def test_only_adamw() -> None:
    def made(**keys: Any) -> Any:
        config = tiny.config(**keys)
        return one_pass(config, build_optimizer(config, tiny.TinyModel().named_parameters()), {}, SITUATION)

    assert made() is not None
    assert made(optimizer={"type": "lion", "params": {"lr": 1e-3}}) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_kernel_is_chosen_on_a_gpu_and_agrees(precision: str) -> None:
    states = []
    for wish in (True, False):
        config = tiny.config(precision=precision, optimizer_fusion=wish)
        engine = tiny.build_engine(config, Mesh.single(torch.device("cuda")), tiny.TinyModel(), tiny.objective)
        assert (engine._one_pass._update is adamw.adamw_update_) == (not wish)
        tiny.train(engine, config, 0, 5)
        engine.check_masters()
        states.append(tiny.merge([tiny.full_state(engine)]))
    for key, tensor in states[1].items():
        torch.testing.assert_close(states[0][key], tensor, rtol=2**-7, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
