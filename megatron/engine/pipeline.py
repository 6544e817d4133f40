"""Pipeline stages under DeepSpeed's pipeline engine (1F1B) and ZeRO 1.

DeepSpeed averages gradients over the M micro-batches and over the D ranks that hold the same parameters, so
each micro-batch is back-propagated as sum * M * D / T to be divided by the trained tokens T of the whole step.

A stage seeds its random stream before each forward pass with (iteration, micro-batch, replica, stage), and the backward
pass of a recomputed layer brings the first pass's state back. So dropout masks depend on the number of stages, and
not on the order in which the schedule interleaves micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from torch import Tensor, nn

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine import state, zero
from megatron.engine.instructions import Instructions
from megatron.engine.live import LiveEngine
from megatron.engine.stage import Feed, PipelineStage, is_copy
from megatron.engine.step import Update
from megatron.engine.verdict import Verdict
from megatron.errors import EngineError, Problem
from megatron.logs import get_logger
from megatron.model.stage import StageModel
from megatron.objectives.build import Objective
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import bubble_fraction
from megatron.parallel.sharding import StatePiece

logger = get_logger(__name__)


class PipelineEngine(LiveEngine):
    """The Engine of one stage; `engine.build.build_engine` makes it.

    live: what deepspeed.initialize returned for `stage`.
    """

    def __init__(self, config: Config, mesh: Mesh, live: Any, stage: PipelineStage, objective: Objective) -> None:
        self._stage = stage
        super().__init__(config, mesh, live, objective)
        self._shape: tuple[int, ...] | None = None
        self._take_model_step, live._take_model_step = live._take_model_step, _later
        instead = {ReduceTiedGrads: lambda live: _sum_shared_gradients(live, mesh)}
        self._instructions = Instructions()
        live._INSTRUCTION_MAP = self._instructions.told({**live._INSTRUCTION_MAP, **instead})
        _require_same_layout(live.grid, mesh)
        _announce(stage.model, self._num_micro_batches)

    @property
    def model(self) -> nn.Module:
        """This rank's stage of the model."""
        return self._stage.model

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield what this rank owns, as views of the live tensors; save or copy them before the next step.

        The first of the stages that share a parameter owns it."""
        found = self._holdings()
        owned = [fragment for fragment in found.owned if not is_copy(fragment.parameter)]
        return state.pieces(replace(found, owned=owned), self._mesh)

    def _accumulate(self, batches: Sequence[Batch], iteration: int, num_tokens: Tensor) -> Tensor:
        """Run the whole schedule but for its last instruction, the optimizer's step, which waits for the verdict."""
        feed = Feed(
            batches,
            scale=self._num_micro_batches * self._mesh.replicas.size / num_tokens,
            before=lambda micro_batch: self._rng.start_micro_batch(iteration, micro_batch),
            device=self._mesh.device,
            tell=self._tell_loss,
        )
        self._live.global_steps += 1  # as it is after a step: DeepSpeed prints in the step of number 0
        self._live.train_batch(self._iterate(feed, batches))
        self._live.global_steps -= 1
        return self._from_last_stage(feed.losses)

    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        one = torch.ones((), device=self._mesh.device)
        feed = Feed(batches, scale=one, before=lambda micro_batch: None, device=self._mesh.device)
        live = self._live
        live.eval_batch(
            self._iterate(feed, batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
        live.module.train()
        return self._from_last_stage(feed.losses)

    def _update(self, verdict: Verdict) -> Update:
        self._live._force_grad_boundary = True
        try:
            self._show_gradients(zero.gradients(self.model), self._loss_scale())
            return self._step(verdict, lambda: self._take_model_step(None))
        finally:
            self._live._force_grad_boundary = False

    def _iterate(self, feed: Feed, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Hand the stage its feed, and return what DeepSpeed loads itself: the tokens of the first stage."""
        shape = tuple(batches[0].tokens.shape)
        if shape != self._shape:
            self._live.reset_activation_shape()
            self._shape = shape
        self._stage.feed = feed
        self._instructions.start()
        return ((batch.tokens, batch.labels) for batch in batches)

    def _from_last_stage(self, losses: Tensor) -> Tensor:
        """Return the last stage's value on every stage; the others have 0."""
        dist.all_reduce(losses, group=self._mesh.pp.group)
        return losses


def _sum_shared_gradients(live: Any, mesh: Mesh) -> None:
    """Sum the gradients of parameters that stages share over those stages, alike to the last bit.

    In the place of DeepSpeed's instruction, which does not look where ZeRO 1 accumulates fp16 gradients in fp32. The
    sum over replicas, which DeepSpeed does next, adds in an order that depends on a gradient's place in a buffer, and
    stages have different buffers. So where order matters, it is done here, and DeepSpeed is left with a sum of which
    one replica brings all and the others nothing.
    """
    for weight, group in live.module.get_tied_weights_and_groups():
        places = (getattr(weight, "_hp_grad", None), getattr(weight, "grad_accum", None), weight.grad)
        gradient = next(gradient for gradient in places if gradient is not None)
        if mesh.replicas.size > 2:
            dist.all_reduce(gradient, group=mesh.replicas.group)
        dist.all_reduce(gradient, group=group)
        if mesh.replicas.size > 2 and mesh.replicas.rank > 0:
            gradient.zero_()


def _later(settings: Any) -> None:
    """In the place of the optimizer's step within the schedule: it is taken after it, when the loss is known."""


def _require_same_layout(grid: Any, mesh: Mesh) -> None:
    """Raise EngineError unless DeepSpeed places this rank where the mesh does."""
    theirs = (grid.get_stage_id(), grid.get_data_parallel_id(), grid.get_slice_parallel_rank())
    ours = (mesh.pp.rank, mesh.replicas.rank, mesh.tp.rank)
    if theirs != ours:
        raise EngineError(
            Problem(
                what=f"{mesh.describe()}",
                why=f"DeepSpeed has it as stage {theirs[0]}, replica {theirs[1]}, share {theirs[2]}.",
                fix="This is a defect of the engine: report it with the configuration.",
            )
        )


def _announce(model: StageModel, micro_batches: int) -> None:
    """Print what each stage holds, and how long the stages wait for each other."""
    split = model.split
    sizes = split.sizes()
    for stage in range(split.stages):
        layers = split.layers(stage)
        share = sizes[stage] / sum(sizes)
        first, last = split.titles[layers[0]], split.titles[layers[-1]]
        logger.info(
            "pipeline stage %d: %d layers (%s to %s), %s parameters (%.1f %%)",
            *(stage, len(layers), first, last, f"{sizes[stage]:,}", 100 * share),
        )
    logger.info(
        "pipeline bubble: %.1f %% of each step with %d micro-batches (gradient_accumulation_steps) over %d stages",
        *(100 * bubble_fraction(split.stages, micro_batches), micro_batches, split.stages),
    )
