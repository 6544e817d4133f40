"""Which family a model belongs to: the one place that knows all of them."""

from __future__ import annotations

from megatron.config.schema.config import Config
from megatron.errors import ExportError, Problem
from megatron.interop.families import gpt2, gpt_neox, llama
from megatron.interop.family import Family, cannot_import

FAMILIES = {family.model_type: family for family in (gpt_neox.FAMILY, llama.FAMILY, gpt2.FAMILY)}


def export_obstacles(config: Config) -> list[Problem]:
    """Return what keeps a model of this config from being exported, in the nearest architecture; [] where nothing does.

    It needs no weights, so that a run can say it before it trains.
    """
    return min((family.obstacles(config) for family in FAMILIES.values()), key=len)


def family_to_export(config: Config) -> Family:
    """Return the first architecture that expresses the model.

    Raises ExportError with the obstacles of the nearest one where none does.
    """
    obstacles = export_obstacles(config)
    if obstacles:
        raise ExportError(*obstacles)
    return next(family for family in FAMILIES.values() if not family.obstacles(config))


def family_to_import(model_type: object) -> Family:
    """Return the family of config.json's model_type. Raises ExportError for one that is not known."""
    if model_type not in FAMILIES:
        raise cannot_import("model_type", model_type, list(FAMILIES))
    return FAMILIES[str(model_type)]
