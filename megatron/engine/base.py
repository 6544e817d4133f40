"""What the training loop asks of an engine, and what one step tells it.

Nobody above this package asks which engine runs, whether parameters are sharded, or whether there is a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megatron.data.batch import Batch
from megatron.engine.examination import Examination
from megatron.engine.wishes import NONE, Ask, Wishes, nothing
from megatron.parallel.sharding import StatePiece, StateRequest

WatchGradient = Callable[[str, Tensor], None]
"""(canonical name, this rank's share on the tensor axis of the unclipped gradient, fp32, without loss scale)."""


@dataclass(frozen=True)
class Limits:
    """What a step may have and still be applied. loss: mean over its trained tokens, nats. grad_norm: global L2 norm
    before clipping. Equal values are applied; what is not finite never is."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = Limits()
NOTHING = Limits(-math.inf, -math.inf)
"""Limits under which no step changes anything."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; numbers are of the whole step, over all micro-batches and data-parallel ranks.

    loss: mean over the trained tokens, in nats, of the weights before the update.
    num_tokens: trained tokens, those whose loss mask is not 0.
    learning_rate: what this update used.
    grad_norm: global L2 norm of the gradient before clipping; inf where it is not finite.
    clipped_grad_norm: the norm of the gradient that the optimizer got; equal to grad_norm where nothing was clipped.
    loss_scale: what the loss was multiplied by for fp16, else 1.
    skipped: the update was left out, so the weights are unchanged. The iteration counts all the same: data and
        schedule move on.
    not_finite: it was left out because the loss or the gradient is not finite, and no smaller loss scale mends that.
    spiked: it was left out because the loss or the norm is finite, and above its limit.
    wishes: what at least one rank wished when the step was queued; alike on all ranks.
    """

    loss: float
    num_tokens: int
    learning_rate: float
    grad_norm: float
    clipped_grad_norm: float
    loss_scale: float = 1.0
    skipped: bool = False
    not_finite: bool = False
    spiked: bool = False
    wishes: Wishes = NONE


class Evaluated(NamedTuple):
    """loss_sum: of all ranks' batches, nats. num_tokens: their trained tokens. wishes: as in StepResult."""

    loss_sum: float
    num_tokens: int
    wishes: Wishes = NONE


class StateSource(Protocol):
    """Where an engine's state comes from; `megatron.checkpoint.load.CheckpointReader` is one."""

    def shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Return the full shape of a tensor, or None where there is none of this name and kind."""
        ...

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Return the dtype of a tensor that is there."""
        ...

    def fill(self, requests: Sequence[StateRequest]) -> None:
        """Fill the targets of all requests, of tensors that are there, each with no more reading than it needs.

        Raises DamagedCheckpointError where the bytes are not those that were written.
        """
        ...


class Pending(Protocol):
    """A queued step; see `megatron.engine.pending.PendingStep`."""

    def read(self) -> StepResult:
        """Wait until the device has done the step, and return what it did."""
        ...


class Engine(Protocol):
    """The owner of the model's weights and the optimizer's state while training."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained; call it through the engine where parameters are sharded."""
        ...

    def train_step(self, batches: Sequence[Batch], iteration: int) -> StepResult:
        """Do one optimizer step over this rank's micro-batches.

        batches: exactly gradient_accumulation_steps micro-batches.
        iteration: optimizer steps done before this one; learning rate and random streams follow from it.
        """
        ...

    def queue_step(
        self,
        batches: Sequence[Batch],
        iteration: int,
        wishes: Ask = nothing,
        limits: Limits = NO_LIMITS,
    ) -> Pending:
        """Do `train_step` without waiting for the device where the engine can, and say later what it did.

        wishes: what this rank wishes; `StepResult.wishes` says it of all ranks, by a sum that the step makes anyway.
        limits: beyond which the update is left out, the same on every rank.
        """
        ...

    def evaluate(self, batches: Sequence[Batch], wishes: Ask = nothing) -> Evaluated:
        """Return the sum of the losses (nats) and the trained tokens of all ranks' `batches`, without dropout.

        Every rank must bring the same number of batches. wishes: as in `queue_step`."""
        ...

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield what this rank owns of weights, masters and optimizer state; every element has one owner."""
        ...

    def load_state(self, source: StateSource, with_optimizer: bool) -> None:
        """Fill the weights, and masters and optimizer state where `with_optimizer`; every rank must call it.

        Without the optimizer, masters are made from the weights and its state starts afresh. Each rank reads what it
        owns; what several ranks hold alike one of them reads for all.
        Raises CheckpointError on every rank with every tensor that is missing or of another shape on any, and
        DamagedCheckpointError where one cannot be read: the next call starts anew.
        """
        ...

    def check_masters(self) -> None:
        """Raise EngineError unless all weights are their fp32 masters rounded, and `check_replicas` agrees."""
        ...

    def check_replicas(self) -> None:
        """Raise EngineError on every rank, naming tensors and ranks, unless all copies of a tensor are alike.

        Compared bit by bit: weights between data and context parallel ranks, unsplit parameters between tensor parallel
        ranks, tied weights between pipeline stages. Every rank must call it."""
        ...

    def watch_gradients(self, watcher: WatchGradient) -> None:
        """Call `watcher` once for each parameter in each further step, after reduction and before clipping."""
        ...

    def examine(self, batches: Sequence[Batch], iteration: int) -> Examination:
        """Do a step again without changing anything, and return where a value is not finite; every rank calls it.

        batches, iteration: of the step, as `train_step` had them; the weights are those of now."""
        ...

    def read_back(self) -> dict[str, Any]:
        """Return what the live engine says it does, under the names of the keys that asked for it."""
        ...
