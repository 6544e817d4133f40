"""Our own engine where gradients would not fit: each weight is updated in the backward pass, and its gradient freed.

The optimizer's formula, the sums over ranks and the state are those of `LocalEngine`; at any moment there is one
gradient, in fp32, instead of all. So a step is one micro-batch, and nothing may wait for the norm of all gradients:
there is no clipping, and no loss scale. A weight may change in the middle of the backward pass, because its gradient is
complete only when whoever used it has been through its own; PyTorch checks that nobody reads it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.config.schema.config import Config
from megatron.engine.local import LocalEngine
from megatron.engine.pending import Number
from megatron.engine.step import Update
from megatron.engine.verdict import Verdict
from megatron.errors import DivergedError, Problem
from megatron.objectives.build import Objective
from megatron.ops.adamw import coefficient_of, sum_of_squares
from megatron.optim.where import step_where
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.grad_sync import is_partial
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import get_spec


class InBackwardEngine(LocalEngine):
    """The Engine of `optimizer_in_backward`; arguments as in LocalEngine."""

    def __init__(
        self, config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective
    ) -> None:
        super().__init__(config, mesh, model, optimizer, objective)
        self._region = TensorRegion(mesh.tp, config.parallel.sequence_parallel)
        self._places = {id(m): (g, i) for g in optimizer.param_groups for i, m in enumerate(g["params"])}
        self._squares: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _is_direct(self) -> bool:
        return True  # there is no buffer of gradients

    def _start(self, rate: Number) -> Number:
        self._squares = {}
        return super()._start(rate)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                self._apply(name, gradient)

        return take

    @torch.no_grad()
    def _apply(self, name: str, gradient: Tensor) -> None:
        """Update one weight. gradient: of this rank, fp32."""
        parameter, master = self._trained[name], self._masters[name]
        if is_partial(parameter, self._region):
            dist.all_reduce(gradient, group=self._mesh.tp.group)
        if self._mesh.replicas.size > 1:
            dist.all_reduce(gradient, group=self._mesh.replicas.group)
        self._show_gradients([(name, gradient)], 1.0)
        squares = sum_of_squares([gradient])
        self._squares[name] = squares
        group, place = self._places[id(master)]
        groups, self._optimizer.param_groups = (
            self._optimizer.param_groups,
            [{**group, "params": [master], "first": group.get("first", 0) + place}],
        )
        master.grad = gradient
        try:
            self._step_one(parameter, master, squares)
        finally:
            master.grad = None
            self._optimizer.param_groups = groups

    def _step_one(self, parameter: Tensor, master: Tensor, squares: Tensor) -> None:
        """Step the optimizer, whose only parameter has a gradient now; one that is not finite changes nothing."""
        if self._examiner is not None:
            return
        if self._one_pass is not None:
            self._one_pass.step(squares, 1.0, 0.0)
        elif master.grad is not None:
            step_where(self._optimizer, [master.grad], coefficient_of(squares.sqrt(), 1.0, 0.0))
            if parameter is not master:
                parameter.copy_(master)

    def _update(self, verdict: Verdict) -> Update:
        """Give weights that had no gradient a zero one, and return the norm of what has been applied.

        A gradient that was not finite is the end of the run: other weights have changed by then."""
        for name, master in self._masters.items():
            if name not in self._squares:
                self._apply(name, torch.zeros_like(master))
        norm = self._sum_of_squares().sqrt()
        if self._examiner is not None:
            return Update(norm, skipped=True)
        return Update(norm, skipped=False, diverged=verdict.refuses(norm))

    def _diverged(self) -> DivergedError:
        return DivergedError(
            Problem(
                what="optimizer_in_backward = true",
                why="the loss or the gradient of a weight is not finite, and other weights are updated already, so "
                "that the step cannot be skipped.",
                fix="Go on from the last checkpoint without optimizer_in_backward, which skips such steps, or with "
                "a smaller learning rate.",
            )
        )

    def _sum_of_squares(self) -> Tensor:
        """Return the sum over the whole model, in which replicated parameters count once, fp64 scalar."""
        total = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        for name, squares in self._squares.items():
            total[int(get_spec(self._trained[name]).dim is not None)] += squares
        if self._region.is_split:
            dist.all_reduce(total[1], group=self._mesh.tp.group)
        return total.sum()
