"""What our own optimizers add to torch's: their state can be made before the first step.

A checkpoint may be written before the first update, and is loaded into an optimizer that has not stepped yet, so
state is never created lazily: `initial_state` says what a parameter's state is at step 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

State = dict[str, Any]


def subtract_(parameter: Tensor, direction: Tensor, rate: float | Tensor) -> None:
    """Subtract rate times direction in place. rate: a number, or a scalar on the device, which no host need know."""
    if isinstance(rate, Tensor):
        parameter.addcmul_(direction, rate, value=-1.0)
    else:
        parameter.add_(direction, alpha=-rate)


class StatefulOptimizer(Optimizer):
    """An optimizer of ours: a formula for one parameter, and the state it starts from.

    Attribute `elementwise`: True where each element's update depends on that element alone, so that ZeRO may
    hand over any flat slice of the parameters instead of whole tensors.
    """

    elementwise: bool = True

    @abstractmethod
    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return the state of `parameter` before its first update."""

    @abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        """Apply one update in place."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; a closure is evaluated first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, group in self._with_gradient():
            state = self.state[parameter]
            if not state:
                state.update(self.initial_state(parameter, group))
            self._update(parameter, parameter.grad, state, group)
        return loss

    def _with_gradient(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, group
