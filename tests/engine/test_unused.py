"""A weight that a step does not use has a zero gradient in it, in every engine: it decays, and its moments go on.

DeepSpeed's ZeRO 3 would apply the gradient of the last step in which it was used once more.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import preload, run_ranks

preload()
from megatron.optim.schedules import learning_rate  # noqa: E402
from tests.engine import tiny  # noqa: E402
from tests.parallel.matrix import full_state  # noqa: E402

STEPS, GLOBAL = 4, 4
SGD = {"optimizer": {"type": "sgd", "params": {"lr": 1e-2, "momentum": 0.9}}}
LION = {"optimizer": {"type": "lion", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}}
ON_CPU = {
    "optimizer": {"type": "cpu_torch_adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8}},
    "engine": "deepspeed",
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 30, "offload_optimizer": {"device": "cpu"}
    },
}  # fmt: skip


class SometimesUsed(tiny.TinyModel):
    """A model with a table, which decays, that is used in the first of every two forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 2 * tiny.VOCAB).view(tiny.VOCAB, 2))
        self.passes = 0

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.passes += 1
        losses = super().forward(tokens, labels)
        return losses + self.seldom[labels].square().sum(-1) if self.passes % 2 else losses


class NeverUsed(SometimesUsed):
    """The same, whose table no pass uses."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.passes = 1
        return super().forward(tokens, labels)


def train(keys: dict[str, Any], world_size: int, model: Any = SometimesUsed) -> tuple[list[tuple[float, float]], dict]:
    """Return (loss, norm) of each step, and the final weights, fp32 where there are masters."""
    config = tiny.config(world_size, **{"train_micro_batch_size_per_gpu": GLOBAL // world_size, **keys})
    engine = tiny.make_engine(config, model())
    results = tiny.train(engine, config, 0, STEPS)
    state = full_state(engine)
    kind = "master" if any(kind == "master" for kind, _ in state) else "weight"
    weights = {name: tensor.float() for (found, name), tensor in state.items() if found == kind}
    return [(result.loss, result.grad_norm) for result in results], weights


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ours, sgd": (1, SGD, {}),
    "ours, lion": (1, LION, {}),
    "ZeRO 1": (2, SGD, {"stage": 1}),
    "ZeRO 2": (2, LION, {"stage": 2}),
    "ZeRO 3": (2, {}, {"stage": 3}),
    "ZeRO 3, accumulated": (2, {"gradient_accumulation_steps": 3}, {"stage": 3}),
    "ZeRO 3, bf16": (2, {"precision": "bf16"}, {"stage": 3}),
    "ZeRO 3, optimizer on the CPU": (2, {}, ON_CPU),
    "ZeRO 3, optimizer on the CPU, accumulated": (2, {"gradient_accumulation_steps": 3}, ON_CPU),
    "ZeRO 3, optimizer on the CPU, one process": (1, {}, ON_CPU),
}


@functools.cache
def of_our_own(keys: str) -> tuple[list[tuple[float, float]], dict]:
    """Return what our own engine makes of JSON keys on two ranks, where it sums gradients into a buffer."""
    found: tuple[list[tuple[float, float]], dict] = run_ranks(2, train, json.loads(keys), 2)[0]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_gives_it_a_zero_gradient(name: str) -> None:
    world_size, keys, layout = LAYOUTS[name]
    expected, weights = of_our_own(json.dumps(keys))
    for steps, found in run_ranks(world_size, train, {**keys, **layout}, world_size):
        for one, other in zip(steps, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert found.keys() == weights.keys()
        for parameter, weight in weights.items():
            torch.testing.assert_close(found[parameter], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 0), (2, 3)])
@pytest.mark.parametrize("keys", [{}, LION], ids=["adam", "lion"])
def test_it_decays_and_does_nothing_else(keys: dict[str, Any], world_size: int, stage: int) -> None:
    keys = {**keys, "stage": stage, "weight_decay": 0.5}
    config = tiny.config(world_size, **keys)
    rates = [learning_rate(config.optimizer, config.training.train_iters or 0, step) for step in range(STEPS)]
    decayed = NeverUsed().seldom.detach() * math.prod(1 - 0.5 * rate for rate in rates)
    for _, weights in run_ranks(world_size, train, keys, world_size, NeverUsed):
        torch.testing.assert_close(weights["seldom"], decayed, rtol=1e-6, atol=1e-9)
