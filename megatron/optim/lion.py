"""Lion: the sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023, algorithm 2).

p <- p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
m <- beta2 * m + (1 - beta2) * g
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron.optim.base import State, StatefulOptimizer, subtract_


class Lion(StatefulOptimizer):
    """State: exp_avg, the momentum, fp32 of the parameter's shape."""

    def __init__(
        self, params: ParamsT, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return a momentum of zero."""
        return {"exp_avg": torch.zeros_like(parameter)}

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        momentum = state["exp_avg"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        direction = momentum.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
        subtract_(parameter, direction, group["lr"])
        momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)
