"""A step that is queued: what it did is known to the host only when it asks, so that the device never waits for it.

Numbers that stand on the device are copied behind the step into page-locked memory, and an event follows the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron.engine.base import StepResult

Number = float | Tensor
"""A number that the host knows, or a scalar on the device."""


class PendingStep:
    """What a queued step will have done.

    numbers: by name, one of them at least on the device; those are taken as they are now, whatever becomes of them.
    finish: makes the result of them; what it raises, `read` raises.
    """

    def __init__(self, numbers: Mapping[str, Number], finish: Callable[[dict[str, float]], StepResult]) -> None:
        tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        device = next(iter(tensors.values())).device
        on_device = {name: value for name, value in tensors.items() if value.device == device}
        self._known = {name: float(value) for name, value in numbers.items() if name not in on_device}
        self._names = list(on_device)
        self._values = torch.stack([value.detach().double() for value in on_device.values()])
        self._finish = finish
        self._copied: torch.cuda.Event | None = None
        if self._values.is_cuda:
            copy = torch.empty(self._values.shape, dtype=self._values.dtype, pin_memory=True)
            self._values = copy.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepResult:
        """Wait until the device has done the step, and return what it did.

        Raises EngineError where an fp16 run has no smaller loss scale left."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._finish({**self._known, **dict(zip(self._names, self._values.tolist(), strict=True))})
