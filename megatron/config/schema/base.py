"""What all sections share: frozen values, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of keys; each field's name is the flat YAML key, unique over all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
