"""SM3: Adagrad with one accumulator per row and column instead of one per element (Anil et al. 2019, SM3-II).

A_i holds, for dim i, one value per index; broadcast over the other dims, with g the gradient:

    nu  = beta * min_i A_i + (1 - beta) * g^2      (nu = min_i A_i + g^2 where beta is 0)
    A_i <- max of nu over all dims but i           (the running maximum where beta > 0)
    u   = g / sqrt(nu + eps)
    u   <- momentum * m + (1 - momentum) * u; m <- u     (where momentum > 0)
    p   <- p - lr * u

It has no weight decay, and needs whole tensors: a flat slice of a matrix has no rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron.optim.base import State, StatefulOptimizer, subtract_


class SM3(StatefulOptimizer):
    """State: accumulator_<i> for each dim (size 1 in all others), and momentum_buffer where momentum > 0."""

    elementwise = False

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.0, beta: float = 0.0, eps: float = 1e-30
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps})

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return accumulators of zero, one for each dim."""
        state: State = {}
        for dim in range(max(1, parameter.ndim)):
            shape = [length if other == dim else 1 for other, length in enumerate(parameter.shape)]
            state[f"accumulator_{dim}"] = parameter.new_zeros(shape)
        if group["momentum"] > 0:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        beta, momentum = group["beta"], group["momentum"]
        accumulators = [value for key, value in state.items() if key.startswith("accumulator_")]
        nu = accumulators[0].expand_as(gradient).clone()
        for accumulator in accumulators[1:]:
            nu = torch.minimum(nu, accumulator)
        if beta > 0:
            nu.mul_(beta)
        nu.addcmul_(gradient, gradient, value=1 - beta)
        for dim, accumulator in enumerate(accumulators):
            others = [other for other in range(nu.ndim) if other != dim]
            largest = nu.amax(others, keepdim=True) if others else nu
            accumulator.copy_(torch.maximum(accumulator, largest) if beta > 0 else largest)
        direction = nu.add_(group["eps"]).rsqrt_().mul_(gradient)
        if momentum > 0:
            direction.mul_(1 - momentum).add_(state["momentum_buffer"], alpha=momentum)
            state["momentum_buffer"].copy_(direction)
        subtract_(parameter, direction, group["lr"])
