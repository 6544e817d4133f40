"""The attention type of each layer, written out from `attention_config`."""

from __future__ import annotations

from typing import Any

LAYER_TYPES = {"global": "global", "flash": "global", "local": "local"}
"""Names in `attention_config`, and what is built: GPT-NeoX's flash is the same function as its global; a local layer
sees a sliding window."""


def expand_attention(pattern: list[Any] | None, num_layers: int) -> list[str]:
    """Return `num_layers` attention types.

    pattern: None is global everywhere; a list of num_layers names; or a list of [names, repeats or "all"].
    Raises ValueError, with the reason as half a sentence, for a pattern that does not fill num_layers exactly or names
    what cannot be built.
    """
    if pattern is None:
        return ["global"] * num_layers
    names: list[str] = []
    for item in pattern:
        names.extend(_expand_item(item, num_layers))
    if len(names) != num_layers:
        raise ValueError(f"it names {len(names)} layers, and num_layers is {num_layers}")
    unknown = sorted({name for name in names if name.lower() not in LAYER_TYPES})
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not built in this version, which has {' and '.join(LAYER_TYPES)}")
    return [LAYER_TYPES[name.lower()] for name in names]


def _expand_item(item: Any, num_layers: int) -> list[str]:
    if isinstance(item, str):
        return [item]
    if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
        raise ValueError(f'{item!r} is neither a name nor [[names], repeats or "all"]')
    names, repeats = item
    if isinstance(repeats, str) and repeats.lower() == "all":
        if num_layers % len(names):
            raise ValueError(f"its {len(names)} names do not divide num_layers = {num_layers}")
        repeats = num_layers // len(names)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f'{repeats!r} is neither a positive number of repeats nor "all"')
    return [str(name) for name in names] * repeats
