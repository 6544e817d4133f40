"""No value of any key, however odd, ends in anything but a config that works or a ConfigError."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import keys
from megatron.config.blocks import BLOCKS, OptimizerParams
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.readiness import runnable
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.config.transport import pack, unpack
from megatron.errors import ConfigError
from megatron.launch.check import report
from tests.config.small import SMALL

ODD: list[Any] = [
    *(None, "x", "", -1, 0, 1, 1.5, 1e300, 10**30, float("nan"), float("inf"), True, False),
    *([], {}, [1], [None], [[]], [{}], ["a"], [float("inf")], {"a": 1}, {"stage": None}, {1: 2}, b"x", (1, 2)),
]
BASE = {**SMALL, "train_iters": 10}
NAMES = [*keys.fields(), *keys.ALIASES, *keys.IMPLIED, *keys.IGNORED, *keys.REFUSED, keys.PLANNING]


def resolved(flat: dict[str, Any]) -> Config | ConfigError:
    try:
        return resolve(flat)
    except ConfigError as error:
        return error


def attempt(flat: dict[str, Any]) -> None:
    config = resolved(flat)
    if isinstance(config, ConfigError):
        assert config.problems
        assert all(problem.what and problem.why and problem.fix for problem in config.problems), str(config)
        return
    assert unpack(pack(config)) == config
    assert resolve(config.flat()) == config
    assert deepspeed_config(config)["zero_optimization"]["stage"] >= 1
    assert report(config)
    runnable(config)


@pytest.mark.parametrize("key", NAMES)
def test_a_key(key: str) -> None:
    for value in ODD:
        attempt({**BASE, key: value})


@pytest.mark.parametrize("block", list(BLOCKS))
def test_entries_of_a_block(block: str) -> None:
    for entry in BLOCKS[block].model_fields:
        for value in ODD:
            attempt({**BASE, block: {entry: value}})


def test_parameters_of_the_optimizer() -> None:
    for entry in OptimizerParams.model_fields:
        for value in ODD:
            attempt({**BASE, "optimizer": {"params": {"lr": 1e-3, entry: value}}})
