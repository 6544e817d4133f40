"""Updates in the backward pass equal updates after it, with one gradient at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.engine.in_backward import InBackwardEngine
from megatron.errors import EngineError
from megatron.ops import adamw
from megatron.ops.choice import Choices
from tests.parallel.matrix import run_layout
from tests.ranks import preload, run_ranks

preload()
from tests.engine import tiny  # noqa: E402

UNCLIPPED = {"gradient_clipping": 0.0}
AT_ONCE = {**UNCLIPPED, "optimizer_in_backward": True}


def run(keys: dict[str, Any], world_size: int) -> tuple[list[tuple], list[tuple]]:
    """Run inside a rank: losses and norms, and state."""
    config = tiny.config(world_size, **keys)
    engine = tiny.make_engine(config)
    results = tiny.train(engine, config, 0, 4)
    engine.check_masters()
    assert isinstance(engine, InBackwardEngine) == config.optimizer.optimizer_in_backward
    return [(result.loss, result.grad_norm, result.skipped) for result in results], tiny.full_state(engine)


def compare(keys: dict[str, Any], world_size: int = 1) -> None:
    """Fail unless updates in the backward pass give the numbers of those after it, bit by bit."""
    ranks = run_ranks(world_size, run, {**keys, **AT_ONCE}, world_size)
    plain = run_ranks(world_size, run, {**keys, **UNCLIPPED}, world_size)
    for (loss, norm, skipped), (other_loss, other_norm, other_skipped) in zip(ranks[0][0], plain[0][0], strict=True):
        assert (loss, skipped) == (other_loss, other_skipped)
        assert norm == pytest.approx(other_norm, rel=1e-5)
    state, exact = (tiny.merge([rank[1] for rank in found]) for found in (ranks, plain))
    assert all(torch.equal(state[key], exact[key]) for key in exact)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_equals_the_update_after_the_backward_pass(precision: str, world_size: int) -> None:
    compare({"precision": precision}, world_size)


@pytest.mark.parametrize("kind", ["sgd", "lion", "madgrad_wd", "sm3"])
def test_any_optimizer(kind: str) -> None:
    decay = {"weight_decay": 0.0} if kind == "sm3" else {}
    compare({"optimizer": {"type": kind, "params": {"lr": 1e-3}}, "precision": "bf16", **decay})


def test_moments_in_bf16_are_rounded_alike() -> None:
    compare({"moments_dtype": "bf16", "precision": "bf16"})


def test_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choices, "fused", lambda self, operation: getattr(adamw, operation))
    compare({"moments_dtype": "bf16", "precision": "bf16"})


RECOMPUTED = {"checkpoint_activations": True, "checkpoint_operations": ["norm", "activation"]}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, {"model_parallel_size": 2}), (2, {"model_parallel_size": 2, "sequence_parallel": True}),
     (2, {"context_parallel_size": 2}), (1, {**RECOMPUTED, "no_weight_tying": False})],
)  # fmt: skip
def test_in_every_layout(world_size: int, layout: dict[str, Any]) -> None:
    flat = {"gradient_accumulation_steps": 1, **UNCLIPPED, **layout}
    plain, trace = (run_layout({**flat, "optimizer_in_backward": here}, world_size) for here in (False, True))
    for name in ("losses", "grad_norms", "weights"):
        torch.testing.assert_close(getattr(trace, name), getattr(plain, name), rtol=1e-6, atol=1e-7)


def most_gradients() -> int:
    """Run inside a rank: how many gradients there are at most when a weight has been updated."""
    config = tiny.config(**AT_ONCE)
    engine = tiny.make_engine(config)
    most = []
    apply = engine._apply

    def watched(name: str, gradient: torch.Tensor) -> None:
        apply(name, gradient)
        tensors = [*engine._trained.values(), *engine._masters.values()]
        most.append(sum(tensor.grad is not None for tensor in tensors))

    engine._apply = watched
    tiny.train(engine, config, 0, 1)
    assert len(most) == len(engine._trained)
    return max(most)


def test_there_is_one_gradient_at_a_time() -> None:
    assert run_ranks(1, most_gradients) == [0]


def step_with_an_infinite_gradient() -> None:
    config = tiny.config(**AT_ONCE)
    engine = tiny.make_engine(config)
    before = engine.model.norm.bias.detach().clone()
    engine.model.norm.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(EngineError, match="the gradient of a weight is not finite"):
        tiny.train(engine, config, 0, 1)
    assert torch.equal(engine.model.norm.bias, before)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    run_ranks(1, step_with_an_infinite_gradient)
