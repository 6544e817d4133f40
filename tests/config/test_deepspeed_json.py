"""What DeepSpeed is told: the whole dictionary for one run, and the entries that each key moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.resolve import resolve
from tests.config.small import SMALL

GOLDEN = Path(__file__).parent / "deepspeed_golden.json"


def told(**keys: Any) -> dict[str, Any]:
    return deepspeed_config(resolve({**SMALL, **keys}))


def test_the_whole_dictionary() -> None:
    """To renew after a deliberate change: python -m tests.config.test_deepspeed_json"""
    assert _example() == json.loads(GOLDEN.read_text())


def _example() -> dict[str, Any]:
    return told(precision="bf16", train_batch_size=32, train_micro_batch_size_per_gpu=4, zero_optimization={"stage": 2})


@pytest.mark.parametrize(("stage", "served"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_stage_zero_is_served_by_stage_one(stage: int, served: int) -> None:
    assert told(zero_optimization={"stage": stage})["zero_optimization"]["stage"] == served


@pytest.mark.parametrize(
    ("precision", "enabled"), [("fp32", (False, False)), ("fp16", (True, False)), ("bf16", (False, True))]
)
def test_one_precision_is_enabled(precision: str, enabled: tuple[bool, bool]) -> None:
    result = told(precision=precision)
    assert (result["fp16"]["enabled"], result["bf16"]["enabled"]) == enabled
    assert result["data_types"] == {"grad_accum_dtype": "fp32"}
    assert result["communication_data_type"] == "fp32"


def test_what_is_given_is_passed_on() -> None:
    result = told(
        fp16={"enabled": True, "initial_scale_power": 12, "hysteresis": 3},
        gradient_clipping=0,
        zero_optimization={"stage": 3, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        data_types={"grad_accum_dtype": "BF16"},
        communication_data_type="bfloat16",
        wall_clock_breakdown=True,
        flops_profiler={"enabled": True, "profile_step": 5},
        deepspeed_extra_args={"torch_autocast": {"enabled": False}},
    )
    assert result["fp16"]["initial_scale_power"] == 12
    assert result["fp16"]["hysteresis"] == 3
    assert result["fp16"]["loss_scale_window"] == 1000
    assert result["gradient_clipping"] == 0.0
    assert result["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert result["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "ratio": 0.5}
    assert result["data_types"]["grad_accum_dtype"] == "bf16"
    assert result["communication_data_type"] == "bf16"
    assert result["wall_clock_breakdown"] is True
    assert result["flops_profiler"] == {"enabled": True, "profile_step": 5}
    assert result["torch_autocast"] == {"enabled": False}


def test_it_is_a_pure_function() -> None:
    config = resolve({**SMALL, "deepspeed_extra_args": {"a": {"b": 1}}})
    first = deepspeed_config(config)
    first["a"]["b"] = 2
    first["zero_optimization"]["stage"] = 7
    assert deepspeed_config(config)["a"] == {"b": 1}
    assert deepspeed_config(config)["zero_optimization"]["stage"] == 1


def test_deepspeed_knows_every_entry() -> None:
    """Each block is one of DeepSpeed's, so a misspelt or removed entry would be seen here."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    result = _example()
    for name, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("fp16", DeepSpeedFP16Config),
        ("bf16", DeepSpeedBF16Config),
    ):
        known = {info.alias or field for field, info in model.model_fields.items()}
        assert set(result[name]) <= known
        parsed = model(**result[name])
        for field, info in model.model_fields.items():
            if (info.alias or field) in result[name]:
                assert getattr(parsed, field) == result[name][info.alias or field], field


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(_example(), indent=1) + "\n")
