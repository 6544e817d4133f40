"""One plain module under DeepSpeed's ZeRO 1, 2 or 3: a step, a validation, the state out and in.

The loss and the gradient of a step are divided by the number of trained tokens of the whole step, which is
counted over all micro-batches and data-parallel ranks before the first forward pass. So neither depends on how the
batch is split, ragged loss masks included:

    loss = sum of token losses / T,   T = trained tokens of all ranks and micro-batches

DeepSpeed averages gradients over the D data-parallel ranks, so each micro-batch is back-propagated as sum * D / T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine import state, verify
from megatron.engine.base import Objective, ReadTensor, StepResult
from megatron.engine.fragments import fragments, publish_masters
from megatron.errors import EngineError, Problem
from megatron.optim.schedules import learning_rate
from megatron.parallel.mesh import Mesh
from megatron.parallel.rng import RngStreams
from megatron.parallel.sharding import StatePiece


class DeepSpeedEngine:
    """The Engine of a model without pipeline stages; `engine.build.build_engine` makes it.

    live: what deepspeed.initialize returned.
    objective: computes the loss of one micro-batch.
    """

    def __init__(self, config: Config, mesh: Mesh, live: Any, objective: Objective) -> None:
        self._config = config
        self._mesh = mesh
        self._live = live
        self._objective = objective
        self._rng = RngStreams(config.numerics.seed, mesh)
        self._num_micro_batches = config.batch.gradient_accumulation_steps
        self._train_iters = config.training.train_iters or 0
        state.make_states(live.optimizer)

    @property
    def model(self) -> nn.Module:
        """The model; under ZeRO 3 calling it gathers each layer's parameters while they are needed."""
        module: nn.Module = self._live.module
        return module

    def train_step(self, batches: Sequence[Batch], iteration: int) -> StepResult:
        """Do one optimizer step; see `Engine.train_step`.

        Raises EngineError for a wrong number of micro-batches, and where fp16 has no smaller loss scale left.
        """
        self._require_accumulation(batches)
        rate = learning_rate(self._config.optimizer, self._train_iters, iteration)
        for group in self._live.optimizer.param_groups:
            group["lr"] = rate
        loss_scale = float(getattr(self._live.optimizer, "loss_scale", 1.0))
        num_tokens = self._count(batches)
        scale = self._mesh.dp.size / num_tokens.clamp(min=1)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        self._live.train()
        for micro_batch, batch in enumerate(batches):
            self._rng.start_micro_batch(iteration, micro_batch)
            micro_sum, _ = self._objective(self._live, batch.to(self._mesh.device))
            self._live.backward(micro_sum * scale.to(micro_sum.dtype), scale_wrt_gas=False)
            self._step()
            loss_sum += micro_sum.detach()
        self._sum(loss_sum)
        norm = float(self._live.get_global_grad_norm())
        return StepResult(
            loss=float(loss_sum / num_tokens.clamp(min=1)),
            num_tokens=int(num_tokens),
            learning_rate=rate,
            grad_norm=norm,
            clipped_grad_norm=self._clipped(norm),
            loss_scale=loss_scale,
            skipped=not self._live.was_step_applied(),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Return the summed loss and the trained tokens of all ranks; see `Engine.evaluate`."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        self._live.eval()
        for batch in batches:
            local = batch.to(self._mesh.device)
            loss_sum, _ = self._objective(self._live, local)
            totals[0] += loss_sum
            totals[1] += local.loss_mask.sum()
        self._live.train()
        self._sum(totals)
        return float(totals[0]), int(totals[1])

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield what this rank owns, as views of the live tensors; save or copy them before the next step."""
        return state.pieces(self._live.optimizer, self._owned(), self._mesh)

    def load_state(self, read: ReadTensor, with_optimizer: bool) -> None:
        """Fill masters and optimizer state, then the weights from the masters; see `Engine.load_state`."""
        optimizer = self._live.optimizer
        problems = state.fill(optimizer, self._owned(), self._mesh, read, with_optimizer)
        failed = torch.tensor(float(bool(problems)), device=self._mesh.device)
        dist.all_reduce(failed, group=self._mesh.world.group)
        if failed.item():
            raise state.summarise(problems, int(failed))
        publish_masters(optimizer)
        self.check_masters()

    def check_masters(self) -> None:
        """Raise EngineError unless the weights are the rounded masters, on all ranks alike."""
        is_sharded = self._live.zero_optimization_stage() == 3
        verify.check_masters(self._owned(), self.model, self._mesh, is_sharded)

    def read_back(self) -> dict[str, Any]:
        """Return what the live engine does, under the names of the keys that asked for it; all ranks must call it."""
        return verify.read_back(self._live, self._owned(), self._mesh)

    def _owned(self) -> list[Any]:
        return fragments(self._live.optimizer, self.model)

    def _require_accumulation(self, batches: Sequence[Batch]) -> None:
        if len(batches) != self._num_micro_batches:
            raise EngineError(
                Problem(
                    what=f"{len(batches)} micro-batches",
                    why=f"a step takes gradient_accumulation_steps = {self._num_micro_batches}.",
                    fix="Give train_step exactly that many.",
                )
            )

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """Return T, the trained tokens of the step over all data-parallel ranks, without waiting for the device."""
        counts = [batch.loss_mask.sum(dtype=torch.float64) for batch in batches]
        return self._sum(torch.stack(counts).sum().to(self._mesh.device))

    def _sum(self, value: Tensor) -> Tensor:
        """Sum `value` in place over the data-parallel ranks."""
        if self._mesh.dp.size > 1:
            dist.all_reduce(value, group=self._mesh.dp.group)
        return value

    def _step(self) -> None:
        try:
            self._live.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise EngineError(
                Problem(
                    what="fp16 loss scale",
                    why="the gradient overflows even at the smallest scale: the run has diverged.",
                    fix='Load an earlier checkpoint with a smaller learning rate, or use "precision": "bf16".',
                )
            ) from error

    def _clipped(self, norm: float) -> float:
        """Return the norm that is left of `norm`; DeepSpeed divides by max(1, (norm + 1e-6) / gradient_clipping)."""
        limit = self._config.optimizer.gradient_clipping
        return norm / max(1.0, (norm + 1e-6) / limit) if limit > 0 else norm
