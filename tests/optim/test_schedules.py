"""The schedules against GPT-NeoX's own numbers (bit for bit), and what ours do where NeoX's go wrong."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from megatron.config.schema.training import OptimizerConfig
from megatron.errors import ConfigError
from megatron.optim.schedules import decay_horizon, learning_rate


def config(**keys) -> OptimizerConfig:
    peak = keys.pop("lr", 1e-3)
    return OptimizerConfig(optimizer={"type": "adam", "params": {"lr": peak}}, **keys)


def test_every_neox_style_to_the_bit(golden):
    cases = json.loads((golden / "lr" / "lr.json").read_text())["cases"]
    assert len(cases) == 44
    for case in cases:
        keys = {key: case[key] for key in ("lr", "min_lr", "warmup", "lr_decay_iters", "lr_decay_fraction")}
        compat = config(lr_decay_style=case["style"], neox_compat=True, **keys)
        ours = config(lr_decay_style=case["style"], **keys)
        expected = [*case["lr_used_at_step"], case["lr_after_last"]]
        horizon = decay_horizon(ours, case["train_iters"])
        for step, value in enumerate(expected):
            assert learning_rate(compat, case["train_iters"], step) == value
            clamped = expected[horizon] if step > horizon else value
            assert learning_rate(ours, case["train_iters"], step) == clamped


@pytest.mark.parametrize("style", ["linear", "cosine", "wsd"])
def test_the_end_is_min_lr_and_stays(style):
    optimizer = config(lr_decay_style=style, min_lr=1e-4, lr_decay_iters=100, warmup=0.1)
    assert [learning_rate(optimizer, 500, step) for step in (100, 101, 150, 190, 10**9)] == [1e-4] * 5


def test_neox_compat_lets_the_cosine_climb_back():
    optimizer = config(lr_decay_style="cosine", lr=1.0, min_lr=0.1, lr_decay_iters=100, warmup=0.1, neox_compat=True)
    assert learning_rate(optimizer, 200, 150) == pytest.approx(0.628, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_warmup_stable_decay(shape, middle):
    optimizer = config(
        lr_decay_style="wsd", lr=1.0, min_lr=0.2, warmup=0.1, wsd_decay_fraction=0.2, wsd_decay_shape=shape
    )
    rates = [learning_rate(optimizer, 100, step) for step in range(101)]
    assert rates[:11] == [max(1, step) / 10.0 for step in range(11)]
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.2 + middle * 0.8)
    assert rates[100] == 0.2
    assert all(a > b for a, b in pairwise(rates[80:]))


def test_a_run_that_is_all_warmup_has_an_end():
    optimizer = config(lr_decay_style="cosine", lr=1.0, min_lr=0.1, warmup=1.0)
    assert learning_rate(optimizer, 10, 10) == 1.0
    assert learning_rate(optimizer, 10, 11) == 0.1


def test_no_learning_rate_is_said():
    with pytest.raises(ConfigError, match=r"optimizer.params.lr = None: the peak learning rate must be a number"):
        learning_rate(OptimizerConfig(optimizer={"type": "adam"}), 10, 0)
