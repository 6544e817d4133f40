"""The model as a plain list of layer plans, from which a plain module or a pipeline is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerPlan:
    """One layer of the model, not built yet.

    name: canonical name ("embedding", "layers.3", "head"), the prefix of its parameters' names; independent of any
        pipeline split.
    build: makes the module on the default device, with weights not yet meaningful.
    share: plans with equal keys use one module, built by the first of them: tied embeddings and layers that are
        repeated are the same mechanism.
    call: how this plan uses its module, `call(module, *inputs)`; None calls it plainly.
    """

    name: str
    build: Callable[[], nn.Module]
    share: str | None = None
    call: Callable[..., Any] | None = None


def block_number(name: str) -> int | None:
    """Return the number of the repeated block whose layer has this name, or None for any other layer."""
    prefix, _, number = name.partition(".")
    return int(number) if prefix == "layers" else None


def is_block(name: str) -> bool:
    """Return whether the layer of this name is one of the repeated blocks."""
    return block_number(name) is not None
