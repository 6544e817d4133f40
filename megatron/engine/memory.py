"""What a live engine holds on its device, by term, read from its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.engine.step import StepEngine

_GRADIENTS = ("grad", "grad_accum", "_hp_grad")
_ZERO_GRADIENTS = ("averaged_gradients", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
"""Where DeepSpeed's optimizers keep gradients that no parameter shows."""


@dataclass(frozen=True)
class Held:
    """Bytes on the device, by term; a storage counts once, for the first term that it belongs to."""

    weights: int
    masters: int
    moments: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.masters + self.moments + self.gradients


def held(engine: StepEngine, device: torch.device) -> Held:
    """Return what an engine's tensors take of `device` now."""
    holdings, seen = engine._holdings(), set[int]()
    parameters = list(engine.model.parameters())

    def count(tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type == device.type and tensor.numel():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
        return total

    weights = count(getattr(parameter, "ds_tensor", parameter) for parameter in parameters)
    buffers = [buffer for buffer, _ in holdings.buffers]
    masters = count(buffers)
    moments = count(value for state in holdings.optimizer.state.values() for value in state.values())
    gradients = count(
        [
            *(getattr(tensor, name, None) for tensor in (*parameters, *buffers) for name in _GRADIENTS),
            *_gradients_of_zero(getattr(getattr(engine, "_live", None), "optimizer", None)),
        ]
    )
    return Held(weights, masters, moments, gradients)


def _gradients_of_zero(optimizer: Any) -> Iterator[Tensor]:
    for name in _ZERO_GRADIENTS:
        yield from _tensors(getattr(optimizer, name, None))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _tensors(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _tensors(child)
