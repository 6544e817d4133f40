"""What engines over DeepSpeed have in common: their state is the live ZeRO optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron.config.schema.config import Config
from megatron.engine import restore, state, zero
from megatron.engine.base import StateSource
from megatron.engine.fragments import Holdings
from megatron.engine.judged import judged
from megatron.engine.one_update import update_at_once
from megatron.engine.step import StepEngine, Update
from megatron.engine.straight import send_straight
from megatron.engine.verdict import Verdict
from megatron.objectives.build import Objective
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece


class LiveEngine(StepEngine):
    """The part of an engine that is about state. live: what deepspeed.initialize returned."""

    def __init__(self, config: Config, mesh: Mesh, live: Any, objective: Objective) -> None:
        super().__init__(config, mesh, objective)
        self._live = live
        zero.skip_by_norm(live.optimizer)
        self._one_update = update_at_once(live.optimizer, config, mesh)
        send_straight(live.optimizer, mesh, self._one_update, self._num_micro_batches)
        state.make_states(self._holdings())

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield what this rank owns, as views of the live tensors; save or copy them before the next step."""
        return state.pieces(self._holdings(), self._mesh)

    def load_state(self, source: StateSource, with_optimizer: bool) -> None:
        """Fill masters and optimizer state, then the weights from the masters; see `Engine.load_state`."""
        restore.load(self._holdings(), self._mesh, source, with_optimizer)
        zero.publish_masters(self._live.optimizer)
        self.check_masters()

    def read_back(self) -> dict[str, Any]:
        """Return what the live engine does, under the names of the keys that asked for it; all ranks must call it."""
        return zero.read_back(self._live, self._holdings(), self.model, self._mesh)

    @torch.no_grad()
    def _step(self, verdict: Verdict, step: Callable[[], Any]) -> Update:
        """Let DeepSpeed apply the gradient, if the verdict allows. step: its step."""
        with judged(self._live.optimizer, verdict, keep_scale=self._examiner is not None) as found:
            step()
        norm = self._live.get_global_grad_norm() if found.norm is None else found.norm
        return Update(norm, not self._live.was_step_applied(), float(found.is_end_of_scale))

    def _holdings(self) -> Holdings:
        return zero.holdings(self._live.optimizer, self.model)

    def _start(self, rate: float) -> float:
        for group in self._live.optimizer.param_groups:
            group["lr"] = rate
        return self._loss_scale()

    def _loss_scale(self) -> float:
        return float(getattr(self._live.optimizer, "loss_scale", 1.0))
