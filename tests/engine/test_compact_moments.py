"""Moments in bf16: close to fp32 on every engine, in half the bytes; bitwise resumes, and a change of type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.ops import adamw
from megatron.ops.choice import Choices
from megatron.optim.compact_adamw import CompactAdamW
from tests.ranks import preload, run_ranks

preload()
from tests.engine import tiny  # noqa: E402
from tests.engine.sources import Tensors  # noqa: E402

COMPACT = {"moments_dtype": "bf16"}
MOMENTS = ("exp_avg", "exp_avg_sq")


def run(keys: dict[str, Any], world_size: int, steps: int) -> tuple[list[float], list[tuple]]:
    """Run inside a rank: losses and state."""
    config = tiny.config(world_size, **keys)
    engine = tiny.make_engine(config)
    results = tiny.train(engine, config, 0, steps)
    engine.check_masters()
    return [result.loss for result in results], tiny.full_state(engine)


@pytest.mark.parametrize(
    ("world_size", "keys"),
    [
        (1, {}), (1, {"precision": "bf16"}), (2, {"precision": "bf16"}), (2, {"stage": 1}),
        (2, {"stage": 1, "precision": "bf16"}), (2, {"stage": 2, "precision": "bf16"}), (2, {"stage": 3}),
        (2, {"stage": 3, "precision": "bf16"}),
    ],
)  # fmt: skip
def test_training_is_close_to_fp32_moments(world_size: int, keys: dict[str, Any]) -> None:
    ranks = run_ranks(world_size, run, {**keys, **COMPACT}, world_size, 6)
    plain = run_ranks(world_size, run, keys, world_size, 6)
    assert ranks[0][0] == pytest.approx(plain[0][0], rel=3e-3)
    assert ranks[0][0] != plain[0][0]
    state, exact = tiny.merge([rank[1] for rank in ranks]), tiny.merge([rank[1] for rank in plain])
    assert state.keys() == exact.keys()
    for (name, kind), tensor in state.items():
        assert tensor.dtype == (torch.bfloat16 if kind in MOMENTS else exact[name, kind].dtype)
        assert kind != "step" or tensor.item() == 6.0


def test_one_pass_rounds_as_separate_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**COMPACT, "gradient_clipping": 0.0}
    (plain,) = run_ranks(1, run, keys, 1, 4)
    monkeypatch.setattr(Choices, "fused", lambda self, operation: getattr(adamw, operation))
    (one,) = run_ranks(1, run, keys, 1, 4)
    for ours, theirs in zip(one[1], plain[1], strict=True):
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=2**-7, atol=1e-7)


def resume(keys: dict[str, Any]) -> bool:
    """Run inside a rank: does a run that resumes end where the run does that went on?"""
    config = tiny.config(1, **keys, **COMPACT)
    whole = tiny.make_engine(config)
    tiny.train(whole, config, 0, 3)
    saved = tiny.merge([tiny.full_state(whole)])
    resumed = tiny.make_engine(config)
    resumed.load_state(Tensors(saved), with_optimizer=True)
    for engine in (whole, resumed):
        tiny.train(engine, config, 3, 6)
    one, other = (tiny.merge([tiny.full_state(engine)]) for engine in (whole, resumed))
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("keys", [{}, {"stage": 1}])
def test_a_resume_is_bitwise(keys: dict[str, Any]) -> None:
    assert run_ranks(1, resume, keys) == [True]


def resume_in_another_type(before: str, after: str) -> None:
    config = tiny.config(1, moments_dtype=before)
    engine = tiny.make_engine(config)
    tiny.train(engine, config, 0, 2)
    saved = tiny.merge([tiny.full_state(engine)])
    changed = tiny.config(1, moments_dtype=after)
    resumed = tiny.make_engine(changed)
    resumed.load_state(Tensors(saved), with_optimizer=True)
    state = tiny.merge([tiny.full_state(resumed)])
    for (name, kind), tensor in saved.items():
        dtype = (torch.bfloat16 if after == "bf16" else torch.float32) if kind in MOMENTS else tensor.dtype
        assert state[name, kind].dtype == dtype
        assert torch.equal(state[name, kind], tensor.to(dtype))
    tiny.train(resumed, changed, 2, 3)


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_resume_may_change_the_type(before: str, after: str) -> None:
    run_ranks(1, resume_in_another_type, before, after)


def test_tensors_of_two_groups_and_of_two_ranks_are_rounded_by_bits_of_their_own() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def moments(seed: int) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(values.clone()) for _ in range(2)]
        optimizer = CompactAdamW([{"params": [parameter]} for parameter in parameters], lr=1e-3, seed=seed)
        for parameter in parameters:
            parameter.grad = values.clone()
        optimizer.step()
        return [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]

    first, second = moments(seed=5)
    assert 0.1 < (first != second).float().mean() < 0.9
    assert 0.1 < (first != moments(seed=6)[0]).float().mean() < 0.9
    assert torch.equal(first, moments(seed=5)[0])


def test_each_replica_of_zero_is_given_a_seed_of_its_own() -> None:
    def seed() -> int:
        engine = tiny.make_engine(tiny.config(2, stage=1, moments_dtype="bf16"))
        return int(engine._live.optimizer.optimizer.seed)

    first, second = run_ranks(2, seed)
    assert first != second
