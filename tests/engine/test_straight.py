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


def run(straight: bool, stage: int, precision: str, accumulation: int, clip: float) -> tuple[list, list, list, list]:
    from megatron.engine import live

    if not straight:
        live.send_straight = lambda optimizer, mesh: None
    keys: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "gradient_clipping": clip}
    config = tiny.config(1, stage=stage, precision=precision, **keys)
    engine = tiny.make_engine(config, SometimesUsed())
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


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_and_weights_are_those_of_deepspeed(stage, precision, accumulation):
    (ours,) = run_ranks(1, run, True, stage, precision, accumulation, 0.0)
    (theirs,) = run_ranks(1, run, False, stage, precision, accumulation, 0.0)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == other.keys()
        for name, gradient in other.items():
            assert torch.equal(mine[name], gradient), name
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert mine[:4] == other[:4]
        assert torch.equal(mine[4], other[4]), mine[:2]
    norms = [[result.grad_norm for result in results] for results in (ours[0], theirs[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert any(not gradient["seldom"].any() for gradient in ours[1]) == (accumulation == 1)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_the_gradients_memory_serves_every_step(stage, precision):
    ((_, _, _, addresses),) = run_ranks(1, run, True, stage, precision, 1, 1.0)
    first = addresses[: len(addresses) // STEPS]
    assert first * STEPS == addresses
