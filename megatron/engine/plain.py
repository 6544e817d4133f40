"""One plain module under DeepSpeed's ZeRO 1, 2 or 3.

DeepSpeed averages gradients over the D ranks that hold the same parameters, so each micro-batch is back-propagated as
sum * D / T to be divided by the trained tokens T of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.schema.config import Config
from megatron.engine import state, zero
from megatron.engine.base import ReadTensor
from megatron.engine.fragments import Holdings
from megatron.engine.step import MicroBatchEngine, Update, diverged
from megatron.objectives.build import Objective
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece


class DeepSpeedEngine(MicroBatchEngine):
    """The Engine of a model without pipeline stages; `engine.build.build_engine` makes it.

    live: what deepspeed.initialize returned.
    objective: computes the loss of one micro-batch.
    """

    def __init__(self, config: Config, mesh: Mesh, live: Any, objective: Objective) -> None:
        super().__init__(config, mesh, objective)
        self._live = live
        state.make_states(self._holdings())

    @property
    def model(self) -> nn.Module:
        """The model; under ZeRO 3 calling it gathers each layer's parameters while they are needed."""
        module: nn.Module = self._live.module
        return module

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield what this rank owns, as views of the live tensors; save or copy them before the next step."""
        return state.pieces(self._holdings(), self._mesh)

    def load_state(self, read: ReadTensor, with_optimizer: bool) -> None:
        """Fill masters and optimizer state, then the weights from the masters; see `Engine.load_state`."""
        problems = state.fill(self._holdings(), self._mesh, read, with_optimizer)
        state.agree(problems, self._mesh)
        zero.publish_masters(self._live.optimizer)
        self.check_masters()

    def read_back(self) -> dict[str, Any]:
        """Return what the live engine does, under the names of the keys that asked for it; all ranks must call it."""
        return zero.read_back(self._live, self._holdings(), self.model, self._mesh)

    def _holdings(self) -> Holdings:
        return zero.holdings(self._live.optimizer, self.model)

    def _callable(self, training: bool) -> Callable[..., Tensor]:
        self._live.train(training)
        live: Callable[..., Tensor] = self._live
        return live

    def _start(self, rate: float) -> float:
        for group in self._live.optimizer.param_groups:
            group["lr"] = rate
        return float(getattr(self._live.optimizer, "loss_scale", 1.0))

    def _backward(self, loss_sum: Tensor, num_tokens: Tensor) -> None:
        scale = (self._mesh.replicas.size / num_tokens).to(loss_sum.dtype)
        self._live.backward(loss_sum * scale, scale_wrt_gas=False)
        if not self._live.is_gradient_accumulation_boundary():
            self._live.step()  # only counts the micro-batch

    @torch.no_grad()
    def _update(self) -> Update:
        self._show_gradients(zero.gradients(self.model), float(getattr(self._live.optimizer, "loss_scale", 1.0)))
        try:
            self._live.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise diverged() from error
            raise
        return Update(float(self._live.get_global_grad_norm()), not self._live.was_step_applied())
