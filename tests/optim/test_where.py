"""An update without a word to the host equals the plain one, and where it is left out nothing changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from megatron.optim.build import KINDS, initial_state
from megatron.optim.where import step_where

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sgd with momentum": ("sgd", {"momentum": 0.9, "dampening": 0.1}),
    "sgd of nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "lion": ("lion", {}),
    "madgrad": ("madgrad_wd", {}),
    "madgrad without momentum": ("madgrad_wd", {"momentum": 0.0}),
    "sm3": ("sm3", {"momentum": 0.9, "beta": 0.5}),
}


def optimizer(kind: str, params: dict[str, Any]) -> tuple[Optimizer, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (11,), (3, 2))]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    made = KINDS[kind].build(groups, lr=1e-2, **params)
    for group in made.param_groups:
        for parameter in group["params"]:
            made.state[parameter] = initial_state(made, parameter.detach(), group)
    return made, parameters


def give(parameters: list[nn.Parameter], seed: int, factor: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * factor
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def held(made: Optimizer, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    states = [made.state[p] for p in parameters]
    return [p.detach().clone() for p in parameters] + [v.clone() for s in states for v in s.values()]


@pytest.mark.parametrize("case", CASES)
def test_an_update_equals_the_plain_one(case: str) -> None:
    ours, mine = optimizer(*CASES[case])
    theirs, others = optimizer(*CASES[case])
    for seed in range(4):
        step_where(ours, give(mine, seed), torch.tensor(0.25))
        give(others, seed, 0.25)
        theirs.step()
    for one, other in zip(held(ours, mine), held(theirs, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_rate_on_the_device_is_the_rate(case: str) -> None:
    """Whoever records an update changes the rate between replays: it must be read where it stands."""
    ours, mine = optimizer(*CASES[case])
    theirs, others = optimizer(*CASES[case])
    rate = torch.zeros(())
    for group in ours.param_groups:
        group["lr"] = rate
    for seed in range(4):
        rate.fill_(1e-2 * (seed + 1))
        for group in theirs.param_groups:
            group["lr"] = rate.item()
        step_where(ours, give(mine, seed), torch.tensor(0.25))
        step_where(theirs, give(others, seed), torch.tensor(0.25))
    for one, other in zip(held(ours, mine), held(theirs, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", [1.0, math.nan, math.inf])
def test_a_step_that_is_left_out_changes_nothing(case: str, gradient: float) -> None:
    made, parameters = optimizer(*CASES[case])
    step_where(made, give(parameters, 0), torch.tensor(1.0))
    before = copy.deepcopy(held(made, parameters))
    step_where(made, give(parameters, 1, gradient), torch.tensor(math.nan))
    assert all(torch.equal(one, other) for one, other in zip(before, held(made, parameters), strict=True))


def test_another_librarys_optimizer_is_no_case() -> None:
    with pytest.raises(TypeError, match="Adagrad cannot leave out a step"):
        step_where(torch.optim.Adagrad([nn.Parameter(torch.zeros(2))]), [], torch.tensor(1.0))
