"""Which engine trains a config, and which cannot."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.engine import EngineChoice, choose_engine, without_deepspeed
from megatron.config.resolve import resolve
from megatron.errors import ConfigError
from tests.config.small import SMALL


def choose(world_size: int = 1, stage: int = 0, **keys: Any) -> EngineChoice:
    zero = {"stage": stage, **keys.pop("zero", {})}
    return choose_engine(resolve({**SMALL, "zero_optimization": zero, **keys}, world_size))


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("world_size", "stage", "keys", "is_local", "served", "why"),
    [
        (1, 0, {}, True, 0, "ZeRO stage 0 shards nothing"),
        (4, 0, {}, True, 0, "ZeRO stage 0 shards nothing"),
        (1, 3, {}, True, 0, "on one replica ZeRO stage 3 has nothing to shard"),
        (2, 1, {"model_parallel_size": 2}, True, 0, "on one replica"),
        (2, 1, {}, False, 1, "ZeRO stage 1 shards over 2 replicas"),
        (2, 2, {"context_parallel_size": 2}, False, 2, "shards over 2 replicas"),
        (2, 0, {"pipe_parallel_size": 2}, False, 1, "DeepSpeed's pipeline; stage 0 is served by stage 1"),
        (1, 2, {"zero": OFFLOAD}, False, 2, "offload_optimizer.device = cpu is DeepSpeed's"),
        (1, 1, {"data_types": {"grad_accum_dtype": "bf16"}}, False, 1, "grad_accum_dtype = bf16"),
        (1, 1, {"communication_data_type": "bf16"}, False, 1, "communication_data_type = bf16"),
        (1, 1, {"flops_profiler": {"enabled": True}}, False, 1, "flops_profiler is DeepSpeed's"),
        (1, 1, {"deepspeed_extra_args": {"zero_quantized": 1}}, False, 1, "deepspeed_extra_args"),
        (1, 0, {"engine": "deepspeed"}, False, 1, "asks for it; stage 0 is served by stage 1"),
        (1, 2, {"engine": "deepspeed"}, False, 2, "engine: deepspeed asks for it"),
        (1, 2, {"engine": "local"}, True, 0, "engine: local asks for it"),
    ],
)
def test_choice(world_size: int, stage: int, keys: dict[str, Any], is_local: bool, served: int, why: str) -> None:
    choice = choose(world_size, stage, **keys)
    assert (choice.is_local, choice.stage) == (is_local, served)
    assert why in choice.why


@pytest.mark.parametrize(
    ("world_size", "stage", "keys", "why"),
    [
        (2, 0, {"pipe_parallel_size": 2}, "pipe_parallel_size = 2 is DeepSpeed's pipeline"),
        (2, 3, {}, "ZeRO stage 3 shards over 2 replicas. Set engine: auto, which takes DeepSpeed's where it is needed, "
         "or zero_optimization.stage: 0"),
        (1, 1, {"zero": OFFLOAD}, "zero_optimization.offload_optimizer.device = cpu is DeepSpeed's"),
    ],
)  # fmt: skip
def test_what_the_local_engine_cannot(world_size: int, stage: int, keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(world_size, stage, engine="local", **keys)
    assert 'engine = "local"' in str(caught.value)
    assert why in str(caught.value)


def test_what_deepspeed_cannot() -> None:
    for keys in ({"engine": "deepspeed"}, {"world_size": 2, "stage": 1}):
        with pytest.raises(ConfigError, match="only the library's own records graphs"):
            choose(cuda_graphs=True, **keys)
    assert choose(cuda_graphs=True).is_local
    sm3 = {"optimizer": {"type": "sm3", "params": {"lr": 0.1}}, "weight_decay": 0.0}
    assert choose(**sm3).is_local
    with pytest.raises(ConfigError, match="sm3 needs whole tensors"):
        choose(engine="deepspeed", **sm3)


@pytest.mark.parametrize(
    ("keys", "world_size", "expected"),
    [
        ({"engine": "deepspeed"}, 1, "set engine: auto"),
        ({"engine": "deepspeed", "zero_optimization": {"stage": 1}}, 1, "set engine: auto"),
        ({"zero_optimization": {"stage": 2}}, 2, "set zero_optimization.stage: 0"),
        ({"pipe_parallel_size": 2}, 2, "set pipe_parallel_size: 1"),
        (
            {"engine": "deepspeed", "pipe_parallel_size": 2, "zero_optimization": {"stage": 1}},
            4,
            "set engine: auto and pipe_parallel_size: 1 and zero_optimization.stage: 0",
        ),
    ],
)
def test_what_leads_to_our_own_engine(keys: dict[str, Any], world_size: int, expected: str) -> None:
    assert without_deepspeed(resolve({**SMALL, **keys}, world_size=world_size)) == expected
