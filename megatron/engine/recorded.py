"""Our own engine with its steps recorded as CUDA graphs: `cuda_graphs: true`, for small models.

On one process with one micro-batch a whole step is one graph: the count of tokens, both passes, the gradient's norm,
the verdict, clipping, the optimizer, the rounding of weights and fp16's loss scale. Otherwise there is a graph of the
first micro-batch's passes, one of the others', and one of the update; between them the gradient is summed over the
replicas, and each micro-batch gets its random seed. The learning rate and the limits of `spike_guard` are written into
tensors before the step (`engine/graphs.py` says why), and batches are copied into those of the recording. Results are
copied behind each step (`engine/pending.py`), so that they can be read late.

What happens to the recordings:

    a step that is examined (`engine.examine`) or whose gradients are watched     is done without them; they stay
    validation of the same length, a checkpoint that is saved, check_replicas     leave them valid
    a batch of another shape, or with documents                                   ends them: tables that they read may
    validation of another length, or with documents                              give way to others. The next steps
    a checkpoint that is loaded, a rollback of `spike_guard`                      warm up and are recorded again

Gradients lie in the flat fp32 buffer of `GradientBuffer`, also where a step on one process would do without: the
kernels of the update find them in the same place at each step. What the passes need at their peak stays the recording's
own, so a validation needs its memory beside it. Every optimizer of our engine is recorded. No part of this has run on a
GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine.base import Limits, StateSource
from megatron.engine.graphs import Found, Piece, Recorder, recorder_of
from megatron.engine.local import GradientBuffer, LocalEngine
from megatron.engine.pending import Number
from megatron.engine.step import Update, count_tokens
from megatron.engine.verdict import Bounds, Verdict
from megatron.engine.wishes import Ask, own_counts
from megatron.logs import get_logger
from megatron.objectives.build import Objective
from megatron.parallel.mesh import Mesh
from megatron.whereabouts import Phase, enter

logger = get_logger(__name__)


class RecordedEngine(LocalEngine):
    """The Engine of `cuda_graphs: true`; arguments as in LocalEngine."""

    def __init__(
        self, config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective
    ) -> None:
        self._recorder = recorder_of(config, mesh)
        self._recordings = _Recordings(self._recorder)
        super().__init__(config, mesh, model, optimizer, objective)
        self._rate = torch.zeros((), dtype=torch.float32, device=mesh.device)
        self._bounds = Bounds.on(mesh.device)
        self._step_loss, self._step_tokens = (
            torch.zeros((), dtype=torch.float64, device=mesh.device) for _ in range(2)
        )
        self._is_whole = mesh.world.size == 1 and self._num_micro_batches == 1

    def load_state(self, source: StateSource, with_optimizer: bool) -> None:
        """Load as `LocalEngine.load_state` does, and record anew: the optimizer's state lies elsewhere then."""
        self._forget("a checkpoint is loaded")
        super().load_state(source, with_optimizer)

    def _is_direct(self) -> bool:
        return False  # autograd's own gradients lie where they please

    def _start(self, rate: Number) -> Number:
        self._rate.fill_(rate)
        return super()._start(self._rate)

    def _do(self, batches: Sequence[Batch], iteration: int, wishes: Ask, limits: Limits) -> dict[str, Number]:
        if not self._is_whole:
            return super()._do(batches, iteration, wishes, limits)
        if not self._takes(batches[0]):
            do = super()._do
            return self._recorder.warm_up(lambda: do(batches, iteration, wishes, limits))
        model = self._callable(training=True)
        self._bounds.tell(limits)
        self._rng.start_micro_batch(iteration, 0)
        enter(Phase.FORWARD, 0)
        found = self._recordings.piece("step", lambda: self._whole_step(model))()
        enter(Phase.UPDATE)
        return {**found, **own_counts(wishes()), "refused_before": 0.0}

    def _whole_step(self, model: Callable[..., Tensor]) -> dict[str, Number]:
        """Do a step of one micro-batch; what `_do` returns of it."""
        batch = self._recordings.batch
        num_tokens = count_tokens([batch])
        trained = num_tokens.clamp(min=1)
        loss_sum = super()._pass(model, batch, 0, trained).double()
        update = super()._update(Verdict(loss_sum / trained, self._bounds))
        numbers = {"grad_norm": update.grad_norm, "skipped": update.skipped, "diverged": update.diverged}
        return {"loss_sum": loss_sum, "num_tokens": num_tokens, **numbers}

    def _pass(self, model: Callable[..., Tensor], batch: Batch, micro_batch: int, num_tokens: Tensor) -> Tensor:
        if self._is_whole:
            return super()._pass(model, batch, micro_batch, num_tokens)
        if not self._takes(batch):
            return self._recorder.warm_up(lambda: self._complete_pass(model, batch, micro_batch, num_tokens))
        self._step_tokens.copy_(num_tokens)
        enter(Phase.FORWARD, micro_batch)
        name, number = ("other passes", 1) if micro_batch else ("first passes", 0)
        static = self._recordings.batch
        loss = self._recordings.piece(name, lambda: self._complete_pass(model, static, number, self._step_tokens))()
        self._buffer.mark_complete()
        return loss

    def _complete_pass(
        self, model: Callable[..., Tensor], batch: Batch, micro_batch: int, num_tokens: Tensor
    ) -> Tensor:
        """Do the passes of a batch; behind it all gradients are written, and further ones are added."""
        loss = super()._pass(model, batch, micro_batch, num_tokens)
        self._buffer.complete()
        return loss

    def _update(self, verdict: Verdict) -> Update:
        if self._is_whole or self._is_seen_through:
            return super()._update(verdict)
        gradients = self._reduced()
        self._step_loss.copy_(verdict.loss)
        assert isinstance(verdict.limits, Limits)
        self._bounds.tell(verdict.limits)
        of_tensors = Verdict(self._step_loss, self._bounds)
        return self._recordings.piece("update", lambda: self._step_by(gradients, of_tensors))()

    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        if not all(self._recordings.spares(batch) for batch in batches):
            self._forget("validation has batches of another length")
        return super()._losses(batches)

    def _takes(self, batch: Batch) -> bool:
        """Take a batch of training in, and return whether its passes are to be recorded ones."""
        if self._is_seen_through:
            return False
        if not self._recordings.fits(batch):
            self._forget("a batch has another shape" if batch.segments is None else "a batch has documents")
        if batch.segments is None:
            self._recordings.take(batch)
        return batch.segments is None

    @property
    def _is_seen_through(self) -> bool:
        """Whether somebody on the host looks at what the step computes."""
        return self._examiner is not None or self._watcher is not None

    @property
    def _buffer(self) -> GradientBuffer:
        assert self._gradients is not None
        return self._gradients

    def _forget(self, reason: str) -> None:
        """Give up what is recorded, which is not valid any more."""
        if self._recordings.is_empty:
            return
        logger.info("cuda_graphs: steps are recorded anew, as %s", reason)
        self._recorder.start_anew()
        self._recordings = _Recordings(self._recorder)


class _Recordings:
    """The pieces of a step for batches of one shape, and the batch that they read."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._pieces: dict[str, Piece[Any]] = {}
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:
        """The batch that stays in its place."""
        assert self._batch is not None
        return self._batch

    @property
    def is_empty(self) -> bool:
        """Whether no work was done yet that is to be recorded."""
        return not self._pieces

    def piece(self, name: str, work: Callable[[], Found]) -> Piece[Found]:
        """Return the piece of this name. work: what it does, the same at each call."""
        if name not in self._pieces:
            self._pieces[name] = Piece(self._recorder, work)
        return self._pieces[name]

    def fits(self, batch: Batch) -> bool:
        """Return whether a batch can be copied into the one in place, or is the first."""
        return batch.segments is None and (self._batch is None or _shape(batch) == _shape(self._batch))

    def spares(self, batch: Batch) -> bool:
        """Return whether the model computes a batch without other tables than it has for the batch in place."""
        is_first = self._batch is None
        return is_first or (batch.segments is None and batch.tokens.shape[1] == self.batch.tokens.shape[1])

    def take(self, batch: Batch) -> None:
        """Copy a batch that fits into the one in place."""
        if self._batch is None:
            self._batch = Batch(*(torch.empty_like(each, memory_format=_DENSE) for each in _tensors(batch)))
        for place, values in zip(_tensors(self._batch), _tensors(batch), strict=True):
            place.copy_(values)


_DENSE = torch.contiguous_format


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens, batch.labels, batch.loss_mask


def _shape(batch: Batch) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in _tensors(batch)]
