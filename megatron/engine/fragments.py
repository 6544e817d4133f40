"""Which elements of which tensors this rank holds, in one vocabulary for all engines and ZeRO stages.

An optimizer works on fp32 masters: one buffer for each parameter (our own engine), or flat slices of many
parameters (ZeRO). A Fragment names one parameter's part of a buffer: elements [start, start + numel) of the
parameter lie at `offset` of the flattened buffer, and elementwise optimizer state is laid out as the buffer is.
With it, saving, loading and checking need to know nothing else about the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.optim.base import State


@dataclass(frozen=True)
class Fragment:
    """One parameter's elements on this rank.

    shape: of the parameter on this tensor-parallel rank (the whole of it, not the fragment).
    weight: the fragment in the model's dtype, flat; a view that is written through.
    buffer: the fp32 master buffer that holds it at `offset`; the key of its optimizer state.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    weight: Tensor
    buffer: Tensor
    offset: int

    @property
    def master(self) -> Tensor:
        """The fp32 values, flat; a view."""
        return self.part(self.buffer.detach())

    def part(self, like_buffer: Tensor) -> Tensor:
        """Return this fragment's elements of a tensor that is laid out as the buffer, flat; a view."""
        return like_buffer.view(-1).narrow(0, self.offset, self.numel)

    def select(self, full: Tensor) -> Tensor:
        """Return this fragment's elements of a tensor of `shape`, flat."""
        return full.reshape(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Holdings:
    """What one rank's optimizer holds.

    optimizer: torch's (or ours), whose state is keyed by buffer.
    buffers: each master buffer with its parameter group.
    held: everything on this rank, to be filled when loading.
    owned: what this rank saves; over all ranks every element is owned once.
    scaler: the dynamic loss scale of fp16, or None.
    """

    optimizer: Optimizer
    buffers: Sequence[tuple[Tensor, dict[str, Any]]]
    held: Sequence[Fragment]
    owned: Sequence[Fragment]
    scaler: Any | None = None

    @property
    def is_replicated(self) -> bool:
        """Whether all replicas hold the same fragments, of which each owns a part."""
        return self.held is not self.owned

    def state(self, buffer: Tensor) -> State:
        """Return the optimizer's state of a buffer."""
        state: State = self.optimizer.state[buffer]
        return state


def is_elementwise(value: Any, buffer: Tensor) -> bool:
    """Return whether a state entry has one value for each element of its buffer."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == buffer.shape
