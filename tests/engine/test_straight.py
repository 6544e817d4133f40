"""Gradients that go straight to DeepSpeed's optimizers are its own, and stay in memory; one pass updates as it does.

Ways to run: "theirs", all by DeepSpeed; "straight", with our gradients; "ours", with our update as well, what runs do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import preload, run_ranks

preload()
from megatron.engine import stage3_gradients  # noqa: E402
from tests.engine import tiny  # noqa: E402

STEPS = 3


class SometimesUsed(tiny.TinyModel):
    """A model whose head bias is used in the first of every two forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom = torch.nn.Parameter(torch.full((tiny.VOCAB,), 0.1))
        self.passes = 0

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.passes += 1
        losses = super().forward(tokens, labels)
        return losses + self.seldom[labels] ** 2 if self.passes % 2 else losses


def run(
    way: str, stage: int, precision: str, accumulation: int, clip: float, model: Any = SometimesUsed, world: int = 1
) -> tuple[list, list, list, list]:
    from megatron.engine import live

    if way != "ours":
        live.update_at_once = lambda *arguments: None
    if way == "theirs":
        live.send_straight = lambda *arguments: None
    keys: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "gradient_clipping": clip}
    config = tiny.config(world, stage=stage, precision=precision, **keys)
    engine = tiny.make_engine(config, model())
    gradients, addresses, held = tiny.capture_gradients(engine), [], []
    inner = engine._live.optimizer.optimizer
    update = inner.step

    def watched(*arguments: Any) -> Any:
        flat = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        held.extend(flat)  # so that none is used again
        addresses.append([gradient.data_ptr() for gradient in flat])
        return update(*arguments)

    inner.step = watched
    results = tiny.train(engine, config, 0, STEPS)
    assert all(p.grad is None for p in engine.model.parameters()) or way == "theirs"
    engine.check_masters()
    return results, gradients, tiny.full_state(engine), addresses


EVERY_STAGE = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(("stage", "precision"), EVERY_STAGE)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_and_weights_are_those_of_deepspeed(stage, precision, accumulation):
    model = SometimesUsed if stage < 3 else tiny.TinyModel
    (ours,) = run_ranks(1, run, "straight", stage, precision, accumulation, 0.0, model)
    (theirs,) = run_ranks(1, run, "theirs", stage, precision, accumulation, 0.0, model)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == other.keys()
        for name, gradient in other.items():
            assert torch.equal(mine[name], gradient), name
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert mine[:4] == other[:4]
        assert torch.equal(mine[4], other[4]), mine[:2]
    norms = [[result.grad_norm for result in results] for results in (ours[0], theirs[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    if stage < 3:
        assert any(not gradient["seldom"].any() for gradient in ours[1]) == (accumulation == 1)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize(("stage", "precision"), EVERY_STAGE)
def test_one_pass_updates_as_deepspeed_does(stage, precision, accumulation, world):
    found = [
        run_ranks(world, run, way, stage, precision, accumulation, 0.3, tiny.TinyModel, world)
        for way in ("ours", "theirs")
    ]
    for ours, theirs in zip(*found, strict=True):
        for mine, other in zip(ours[0], theirs[0], strict=True):
            assert mine.loss == pytest.approx(other.loss, rel=1e-5 if precision == "fp32" else 1e-3)
            assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5 if precision == "fp32" else 1e-2)
            assert other.grad_norm > 0.3  # clipped
        for mine, other in zip(ours[2], theirs[2], strict=True):
            assert mine[:4] == other[:4]
            torch.testing.assert_close(mine[4], other[4], rtol=1e-4, atol=1e-6 if precision == "fp32" else 1e-3)


def gradients_of_their_own(precision: str, accumulation: int) -> tuple[int, list[int]]:
    config = tiny.config(1, stage=3, precision=precision, gradient_accumulation_steps=accumulation)
    engine = tiny.make_engine(config)
    optimizer = engine._live.optimizer
    sizes = []
    for iteration in range(2):
        tiny.train(engine, config, iteration, 1)
        assert not engine._one_update.parts
        sizes.append(sum(gradient.numel() for gradient in getattr(optimizer, stage3_gradients._GRADIENTS).values()))
    return optimizer.grad_partitions_flat_buffer.numel(), sizes


@pytest.mark.parametrize(("precision", "accumulation", "is_flat"), [("fp32", 1, 0), ("bf16", 1, 0), ("bf16", 2, 1)])
def test_stage_3_has_no_flat_gradients_where_autograd_has_them(precision, accumulation, is_flat):
    ((flat, sizes),) = run_ranks(1, gradients_of_their_own, precision, accumulation)
    assert bool(flat) == is_flat
    assert sizes == [flat, flat]


@pytest.mark.parametrize("way", ["straight", "ours"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_stage_3_has_no_gradient_of_a_step_before_where_deepspeed_would(accumulation, way):
    stages = [run_ranks(1, run, way, stage, "fp32", accumulation, 0.0)[0] for stage in (2, 3)]
    for expected, gradients in zip(*(found[1] for found in stages), strict=True):
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), name
    pieces = [{piece[:2]: piece[4] for piece in found[2]} for found in stages]
    for key, value in pieces[0].items():
        assert torch.equal(pieces[1][key], value), key


def masters_that_are_weights(stage: int, precision: str) -> list[bool]:
    engine = tiny.make_engine(tiny.config(2, stage=stage, precision=precision))
    tiny.train(engine, tiny.config(2, stage=stage, precision=precision), 0, 1)
    engine.check_masters()
    return [
        fragment.weight.data_ptr() == fragment.buffer.data_ptr() + 4 * fragment.offset
        for fragment in engine._holdings().held
    ]


@pytest.mark.parametrize(("precision", "shared"), [("fp32", True), ("bf16", False)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_keeps_one_copy_of_fp32_weights(stage, precision, shared):
    for found in run_ranks(2, masters_that_are_weights, stage, precision):
        assert found
        assert all(is_shared == shared for is_shared in found)


@pytest.mark.parametrize(("way", "accumulation"), [("straight", 1), ("ours", 2)])
@pytest.mark.parametrize(("stage", "precision"), EVERY_STAGE)
def test_the_gradients_memory_serves_every_step(stage, precision, way, accumulation):
    ((_, _, _, addresses),) = run_ranks(1, run, way, stage, precision, accumulation, 1.0)
    assert all(addresses)
    first = addresses[: len(addresses) // STEPS]
    assert first * STEPS == addresses
