"""AdamW whose moments are kept in bf16: 4 bytes less for each parameter and moment than torch's, two of each.

The update is `megatron.ops.adamw`'s, in fp32, and what is kept of the moments is rounded at random by bits that follow
from (seed, number of the update, place of the tensor among all, element). So a resumed run in the same layout rounds as
the run would have that went on. Ranks that hold shares of the state (ZeRO) are given seeds of their own; ranks of the
tensor axis share one, since what they all hold must stay alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.ops.adamw import adamw_update_
from megatron.optim.base import State, StatefulOptimizer


class CompactAdamW(StatefulOptimizer):
    """AdamW (Loshchilov & Hutter 2019) with moments in bf16; `seed` is that of their rounding."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        places = 0
        for group in self.param_groups:
            group["first"] = places  # the place of its first tensor among all
            places += len(group["params"])

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return t = 0 and moments of zeros."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **moments}

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        state["step"] += 1
        beta1, beta2 = group["betas"]
        adamw_update_(
            [gradient],
            [parameter],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            torch.ones((), device=parameter.device),
            state["step"],
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            self.seed,
            group.get("first", 0) + _number(parameter, group),
        )


def _number(parameter: Tensor, group: dict[str, Any]) -> int:
    """Return the place of a parameter in its group."""
    return next(number for number, other in enumerate(group["params"]) if other is parameter)
