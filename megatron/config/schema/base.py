"""What all sections share: frozen values, no unknown keys, and a description, unit and range for each field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of keys; each field's name is the flat YAML key, unique over all sections.

    Types are strict: `1` is a float where a float is asked, but `"1"`, `1.0` or `true` is not an integer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def setting(default: Any, description: str, *, unit: str | None = None, **constraints: Any) -> Any:
    """Return the pydantic field of one key.

    default: its value when no file sets it; `...` for a key that every model must set.
    description: one sentence; what the value does, and its meaning where it is None or 0.
    unit: what a number counts ("tokens", "optimizer steps", "fraction"); None for what is not a number.
    constraints: pydantic's ge, gt, le, lt; each number has at least one.
    """
    return Field(default, description=description, json_schema_extra={"unit": unit} if unit else {}, **constraints)
