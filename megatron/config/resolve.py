"""Flat keys -> Config."""

from __future__ import annotations

from typing import Any

from megatron.config.schema.config import Config


def resolve(flat: dict[str, Any], world_size: int = 1) -> Config:
    """Return the frozen Config of flat keys for a world of `world_size` processes.

    Raises ConfigError with all problems at once."""
    values = dict(flat)
    tp = values.get("model_parallel_size", 1)
    pp = max(1, values.get("pipe_parallel_size", 0))
    values["world_size"] = world_size
    dp = world_size // (tp * pp)
    micro = values.setdefault("train_micro_batch_size_per_gpu", 1)
    gas = values.setdefault("gradient_accumulation_steps", 1)
    values.setdefault("train_batch_size", micro * gas * dp)
    sections: dict[str, dict[str, Any]] = {}
    for name, field in Config.model_fields.items():
        section_fields = field.annotation.model_fields
        sections[name] = {key: values.pop(key) for key in list(values) if key in section_fields}
    if values:
        raise ValueError(f"unknown keys {sorted(values)}")
    return Config(**sections)
