"""A small model for the tests of the configuration, and a way to see what is wrong with a variant of it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.resolve import resolve
from megatron.errors import ConfigError

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
}


def problems(**keys: Any) -> str:
    """Return what resolve says is wrong with the small model and some keys, one problem per line."""
    world_size = keys.pop("world", 1)
    with pytest.raises(ConfigError) as caught:
        resolve({**SMALL, **keys}, world_size)
    return str(caught.value)
