"""AdamW without waiting for the device: what the library's own engine does.

The gradient's norm, the clip coefficient and the number of the update stay on the device. Either one kernel reads
gradients, masters and moments, and writes masters, moments and the rounded weights, or torch's fused kernel does all
but the last (`megatron.ops.adamw` has the formula). Groups and state are those of a torch AdamW, so checkpoints are
the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from megatron.config.schema.config import Config
from megatron.logs import get_logger
from megatron.ops.adamw import adamw_update_, coefficient_of, sum_of_squares
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Function, Situation, choose
from megatron.ops.measured import fastest
from megatron.optim.compact_adamw import CompactAdamW

logger = get_logger(__name__)


class OnePassAdamW:
    """Steps torch's AdamW or ours, whose parameters are fp32 masters, all of them or none with a rounded weight.

    weights: the weight of each master, by the master's id. update, squares: the operations `adamw_update_` and
    `sum_of_squares`. A gradient is a master's, or its weight's in the weight's dtype; where there is none it is 0.
    """

    def __init__(
        self, optimizer: AdamW | CompactAdamW, weights: Mapping[int, Tensor], update: Function, squares: Function
    ) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._update = update
        self.squares = squares

    @torch.no_grad()
    def step(self, squares: Tensor, loss_scale: float | Tensor, clip: float, refused: Tensor | None = None) -> Tensor:
        """Do one update and return the gradient's norm before clipping, an fp64 scalar on the device.

        squares: sum of the squares of all gradients, which are `loss_scale` times the loss's. Where it is not finite
        nothing changes, nor where `refused` is true, bool scalar on the device.
        """
        norm = squares.sqrt() / loss_scale
        allowed = norm if refused is None else torch.where(refused, math.nan, norm)
        coefficient = coefficient_of(allowed, loss_scale, clip)
        counted = torch.isfinite(allowed).float()
        for group in self._optimizer.param_groups:
            masters = group["params"]
            gradients = [_gradient(master, self._weights.get(id(master), master)) for master in masters]
            weights = [self._weights[id(master)].detach() for master in masters if id(master) in self._weights]
            self.update(group, gradients, weights, coefficient, counted)
        return norm

    @torch.no_grad()
    def update(
        self,
        group: Mapping[str, Any],
        gradients: Sequence[Tensor | Sequence[Tensor]],
        weights: Sequence[Tensor],
        coefficient: Tensor,
        counted: Tensor,
    ) -> None:
        """Do one update of a group's masters.

        gradients: of each master a tensor of its size, or, of a flat one, the tensors that it is made of, in order.
        weights: rounded copies of all masters, or none. coefficient: what gradients are multiplied with, fp32 scalar;
        nothing changes where it is not finite. counted: 1 where this update counts, else 0, fp32 scalar.
        """
        states = [self._optimizer.state[master] for master in group["params"]]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [counted] * len(steps))

        def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
            """Return one tensor for each gradient."""
            return [part for tensor, like in zip(tensors, gradients, strict=True) for part in _cut(tensor, like)]

        self._update(
            [part for gradient in gradients for part in _parts(gradient)],
            cut([master.detach() for master in group["params"]]),
            cut([state["exp_avg"] for state in states]),
            cut([state["exp_avg_sq"] for state in states]),
            cut(weights) if weights else [],
            coefficient,
            steps[0],
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            getattr(self._optimizer, "seed", 0),
            group.get("first", 0),
        )


def one_pass(
    config: Config, optimizer: Optimizer, weights: Mapping[int, Tensor], situation: Situation
) -> OnePassAdamW | None:
    """Return what steps `optimizer`, by the kernels that `optimizer_fusion` chooses, or None where it is no AdamW.

    weights: as in OnePassAdamW.
    """
    if not isinstance(optimizer, (AdamW, CompactAdamW)):
        return None
    wish = config.kernels.optimizer_fusion
    choices = choose({"adamw_update_": wish, "sum_of_squares": wish}, situation, CATALOGUE, fastest)
    if situation.device.type == "cuda" or choices.refused() or wish not in ("auto", False):
        logger.info("the optimizer on %s:\n%s", situation.device, choices.table())
    update, squares = choices.get("adamw_update_", adamw_update_), choices.get("sum_of_squares", sum_of_squares)
    return OnePassAdamW(optimizer, weights, update, squares)


def _parts(gradient: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [gradient] if isinstance(gradient, Tensor) else gradient


def _cut(tensor: Tensor, like: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a tensor in the pieces of its gradient, flat ones."""
    return [tensor] if isinstance(like, Tensor) else tensor.split([part.numel() for part in like])


def _gradient(master: Tensor, weight: Tensor) -> Tensor:
    gradient = weight.grad if master.grad is None else master.grad
    return torch.zeros_like(weight) if gradient is None else gradient.contiguous()
