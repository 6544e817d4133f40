"""Gradients that go straight into the optimizers' buffers are DeepSpeed's own, and their memory stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import preload, run_ranks

preload()
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
    straight: bool, stage: int, precision: str, accumulation: int, clip: float, model: Any = SometimesUsed
) -> tuple[list, list, list, list]:
    from megatron.engine import live

    if not straight:
        live.send_straight = lambda optimizer, mesh: None
    keys: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "gradient_clipping": clip}
    config = tiny.config(1, stage=stage, precision=precision, **keys)
    engine = tiny.make_engine(config, model())
    gradients, addresses, held = tiny.capture_gradients(engine), [], []
    inner = engine._live.optimizer.optimizer
    update = inner.step

    def watched(*arguments: Any) -> Any:
        held.extend(p.grad for group in inner.param_groups for p in group["params"])  # so that none is used again
        addresses.append([p.grad.data_ptr() for group in inner.param_groups for p in group["params"]])
        return update(*arguments)

    inner.step = watched
    results = tiny.train(engine, config, 0, STEPS)
    assert all(p.grad is None for p in engine.model.parameters()) or not straight
    return results, gradients, tiny.full_state(engine), addresses


EVERY_STAGE = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(("stage", "precision"), EVERY_STAGE)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_and_weights_are_those_of_deepspeed(stage, precision, accumulation):
    model = SometimesUsed if stage < 3 else tiny.TinyModel
    (ours,) = run_ranks(1, run, True, stage, precision, accumulation, 0.0, model)
    (theirs,) = run_ranks(1, run, False, stage, precision, accumulation, 0.0, model)
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


@pytest.mark.parametrize("accumulation", [1, 3])
def test_stage_3_has_no_gradient_of_a_step_before_where_deepspeed_would(accumulation):
    stages = [run_ranks(1, run, True, stage, "fp32", accumulation, 0.0)[0] for stage in (2, 3)]
    for expected, gradients in zip(*(found[1] for found in stages), strict=True):
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), name
    pieces = [{piece[:2]: piece[4] for piece in found[2]} for found in stages]
    for key, value in pieces[0].items():
        assert torch.equal(pieces[1][key], value), key


def masters_that_are_weights(precision: str) -> list[bool]:
    engine = tiny.make_engine(tiny.config(2, stage=3, precision=precision))
    tiny.train(engine, tiny.config(2, stage=3, precision=precision), 0, 1)
    engine.check_masters()
    return [
        fragment.weight.data_ptr() == fragment.buffer.data_ptr() + 4 * fragment.offset
        for fragment in engine._holdings().held
    ]


@pytest.mark.parametrize(("precision", "shared"), [("fp32", True), ("bf16", False)])
def test_stage_3_keeps_one_copy_of_fp32_weights(precision, shared):
    for found in run_ranks(2, masters_that_are_weights, precision):
        assert found
        assert all(is_shared == shared for is_shared in found)


@pytest.mark.parametrize(("stage", "precision"), EVERY_STAGE)
def test_the_gradients_memory_serves_every_step(stage, precision):
    ((_, _, _, addresses),) = run_ranks(1, run, True, stage, precision, 1, 1.0)
    first = addresses[: len(addresses) // STEPS]
    assert first * STEPS == addresses
