"""MADGRAD with decoupled weight decay (Defazio and Jelassi 2021, algorithm 1; decay as in AdamW).

With k updates done, step = lr + eps and c = 1 - momentum:

    p   <- p * (1 - step * weight_decay)
    lam =  step * sqrt(k + 1)
    v   <- v + lam * g^2
    s   <- s + lam * g
    z   =  x0 - s / (v^(1/3) + eps)
    p   <- (1 - c) * p + c * z

x0 is the starting point. Without momentum it is not stored but recovered from p, so that decay reaches it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron.optim.base import State, StatefulOptimizer


class MadgradWD(StatefulOptimizer):
    """State: step (updates done), s and v (weighted sums of gradients and squares), x0 where momentum > 0."""

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return sums of zero, and where the run starts from."""
        step = torch.zeros((), device=parameter.device)
        state: State = {"step": step, "s": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
        if group["momentum"] != 0:
            state["x0"] = parameter.detach().clone()
        return state

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        eps, momentum = group["eps"], group["momentum"]
        step_size = group["lr"] + eps
        weighted = gradient * (step_size * (state["step"] + 1).sqrt())
        s, v = state["s"], state["v"]
        parameter.mul_(1 - step_size * group["weight_decay"])
        x0 = state["x0"] if momentum != 0 else parameter.addcdiv(s, _cube_root(v, eps))
        v.addcmul_(weighted, gradient)
        s.add_(weighted)
        z = x0.addcdiv(s, _cube_root(v, eps), value=-1)
        parameter.mul_(momentum).add_(z, alpha=1 - momentum)
        state["step"] += 1


def _cube_root(v: Tensor, eps: float) -> Tensor:
    return v.pow(1 / 3).add_(eps)
