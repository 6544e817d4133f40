"""One optimizer step as every engine does it; how gradients are kept and applied is left to the engine.

The loss and the gradient of a step are divided by the number of trained tokens of the whole step, which is
counted over all micro-batches and replicas before the first forward pass. So neither depends on how the
batch is split, ragged loss masks included:

    loss = sum of token losses / T,   T = trained tokens of all ranks and micro-batches

Nothing here waits for the device: counts, losses and norms stay there until somebody reads the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.schema.config import Config
from megatron.data.batch import Batch, shard_sequence
from megatron.engine import replicas, verify
from megatron.engine.base import NO_LIMITS, NOTHING, Evaluated, Limits, StepResult, WatchGradient
from megatron.engine.examination import Examination
from megatron.engine.examine import Examiner
from megatron.engine.fragments import Holdings
from megatron.engine.pending import Number, PendingStep
from megatron.engine.verdict import Verdict
from megatron.engine.wishes import Ask, Wish, counts, heard, message, nothing, own_counts
from megatron.errors import DivergedError, EngineError, Problem
from megatron.objectives.build import Objective
from megatron.optim.schedules import learning_rate
from megatron.parallel.mesh import Mesh
from megatron.parallel.rng import RngStreams
from megatron.whereabouts import Phase, enter


@dataclass(frozen=True)
class Update:
    """What applying the gradient found: its global norm before clipping, whether the update was left out, and whether
    the run cannot go on (an fp16 run has no smaller loss scale left). Numbers, or scalars on the device."""

    grad_norm: Number
    skipped: Number
    diverged: Number = 0.0


class StepEngine(ABC):
    """The part of an engine that does not depend on how parameters are kept."""

    def __init__(self, config: Config, mesh: Mesh, objective: Objective) -> None:
        self._config = config
        self._mesh = mesh
        self._objective = objective
        self._rng = RngStreams(config.numerics.seed, mesh)
        self._num_micro_batches = config.batch.gradient_accumulation_steps
        self._train_iters = config.training.train_iters or 0
        self._watcher: WatchGradient | None = None
        self._last_refused: Number = 0.0
        self._examiner: Examiner | None = None

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model, with this rank's parameters under their canonical names."""

    @abstractmethod
    def _holdings(self) -> Holdings:
        """Return what this rank holds of masters and optimizer state."""

    @abstractmethod
    def _start(self, rate: float) -> Number:
        """Prepare a step with this learning rate, and return the loss scale."""

    @abstractmethod
    def _accumulate(self, batches: Sequence[Batch], iteration: int, num_tokens: Tensor) -> Tensor:
        """Make the gradient of (sum of all losses) / num_tokens, and return this rank's sum of losses, fp64 scalar."""

    @abstractmethod
    def _update(self, verdict: Verdict) -> Update:
        """Sum the gradient over the ranks, clip it, and apply it if the verdict allows."""

    @abstractmethod
    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        """Return this rank's sum of losses, fp64 scalar, without dropout and without a gradient."""

    def check_masters(self) -> None:
        """Raise EngineError unless the weights are the rounded masters and all copies are alike; see `Engine`."""
        verify.check_masters(self._holdings().held, self._mesh)
        self.check_replicas()

    def check_replicas(self) -> None:
        """Raise EngineError on every rank unless all copies of a tensor are alike; see `Engine`."""
        replicas.check(replicas.copies(self.model, self._holdings()), self._mesh)

    def watch_gradients(self, watcher: WatchGradient) -> None:
        """Show every gradient of every further step; see `Engine`."""
        self._watcher = watcher

    def examine(self, batches: Sequence[Batch], iteration: int) -> Examination:
        """Do a step again, changing nothing, and say where a value is not finite; see `Engine.examine`."""
        examiner, watcher = Examiner(self.model, self._mesh), self._watcher
        examiner.look_at_weights(self._holdings().held)
        self._examiner, self._watcher = examiner, examiner.take_gradient
        try:
            with examiner.hooked():
                self.queue_step(batches, iteration, limits=NOTHING).read()
        finally:
            self._examiner, self._watcher = None, watcher
        return examiner.conclude()

    def _tell_loss(self, micro_batch: int, loss_sum: Tensor, batch: Batch) -> None:
        """Show the loss of a micro-batch to whoever examines the step; an engine calls it for each."""
        if self._examiner is not None:
            self._examiner.take_loss(micro_batch, loss_sum.detach(), batch.loss_mask.sum())

    def _show_gradients(self, gradients: Iterable[tuple[str, Tensor]], loss_scale: Number) -> None:
        """Show the reduced gradients, before they are clipped, to whoever watches; an engine calls it in each step.

        gradients: (canonical name, this rank's share on the tensor axis, times loss_scale); is read only if watched.
        """
        if self._watcher is not None:
            for name, gradient in gradients:
                self._watcher(name, gradient.float() / loss_scale)

    def train_step(self, batches: Sequence[Batch], iteration: int) -> StepResult:
        """Do one optimizer step and wait for it; see `Engine.train_step`.

        Raises EngineError for a wrong number of micro-batches, and where fp16 has no smaller loss scale left.
        """
        return self.queue_step(batches, iteration).read()

    def queue_step(
        self,
        batches: Sequence[Batch],
        iteration: int,
        wishes: Ask = nothing,
        limits: Limits = NO_LIMITS,
    ) -> PendingStep:
        """Queue one optimizer step; see `Engine.queue_step`. Raises EngineError for a wrong number of micro-batches."""
        self._require_accumulation(batches)
        batches = self._parts(batches)
        rate = learning_rate(self._config.optimizer, self._train_iters, iteration)
        enter(Phase.TOKEN_COUNT)
        loss_scale = self._start(rate)
        numbers = self._do(batches, iteration, wishes, limits)
        self._last_refused = numbers["skipped"]
        return PendingStep({"loss_scale": loss_scale, **numbers}, lambda found: self._result(rate, found))

    def _do(self, batches: Sequence[Batch], iteration: int, wishes: Ask, limits: Limits) -> dict[str, Number]:
        """Do a step, and return what it did, under the names that `_result` knows."""
        num_tokens = self._sum(count_tokens(batches))
        trained = num_tokens.clamp(min=1)
        loss_sum = self._accumulate(batches, iteration, trained)
        enter(Phase.LOSS_SUM)
        (loss_sum,), refused_before, told = self._total((loss_sum,), wishes(), self._last_refused)
        enter(Phase.UPDATE)
        update = self._update(Verdict(loss_sum / trained, limits))
        return {
            "loss_sum": loss_sum,
            "num_tokens": num_tokens,
            "refused_before": refused_before,
            **told,
            "grad_norm": update.grad_norm,
            "skipped": update.skipped,
            "diverged": update.diverged,
        }

    def _result(self, rate: float, found: dict[str, float]) -> StepResult:
        """Return what a step did. found: its numbers, now that they are known."""
        if found["diverged"]:
            raise self._diverged()
        if 0 < found["refused_before"] < self._mesh.world.size:
            raise _disagreement(int(found["refused_before"]), self._mesh.world.size)
        loss = found["loss_sum"] / max(1, found["num_tokens"])
        skipped = bool(found["skipped"])
        norm = found["grad_norm"] if math.isfinite(found["grad_norm"]) else math.inf
        is_bad = skipped and not (math.isfinite(loss) and (self._mends_overflow() or math.isfinite(norm)))
        return StepResult(
            loss=loss,
            num_tokens=int(found["num_tokens"]),
            learning_rate=rate,
            grad_norm=norm,
            clipped_grad_norm=clipped(norm, self._config.optimizer.gradient_clipping),
            loss_scale=found["loss_scale"],
            skipped=skipped,
            not_finite=is_bad,
            spiked=skipped and math.isfinite(loss) and math.isfinite(norm),
            wishes=heard(found),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], wishes: Ask = nothing) -> Evaluated:
        """Return the summed loss and the trained tokens of all ranks; see `Engine.evaluate`."""
        batches = self._parts(batches)
        sums = (self._losses(batches), count_tokens(batches))
        enter(Phase.LOSS_SUM)
        (loss_sum, num_tokens), _, told = self._total(sums, wishes())
        return Evaluated(float(loss_sum), int(num_tokens), heard({name: float(count) for name, count in told.items()}))

    def _mends_overflow(self) -> bool:
        """Say whether a gradient that is not finite is followed by a smaller loss scale, as fp16 has it."""
        settings = self._config.deepspeed.fp16 or {}
        return self._config.numerics.precision == "fp16" and not settings.get("loss_scale")

    def _diverged(self) -> DivergedError:
        """Return the error of a run that cannot go on."""
        return DivergedError(
            Problem(
                what="fp16 loss scale",
                why="the gradient overflows even at fp16.min_loss_scale: the run has diverged.",
                fix="Load an earlier checkpoint with a smaller learning rate, or use precision: bf16.",
            )
        )

    def _require_accumulation(self, batches: Sequence[Batch]) -> None:
        if len(batches) != self._num_micro_batches:
            raise EngineError(
                Problem(
                    what=f"{len(batches)} micro-batches",
                    why=f"a step takes gradient_accumulation_steps = {self._num_micro_batches}.",
                    fix="Give train_step exactly that many.",
                )
            )

    def _parts(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return what this rank computes of each batch, on its device; ranks of the context axis are given the same."""
        return [shard_sequence(batch.to(self._mesh.device), self._mesh.cp) for batch in batches]

    def _total(
        self, sums: Sequence[Tensor], wishes: Collection[Wish], refused: Number = 0.0
    ) -> tuple[list[Tensor], Number, dict[str, Number]]:
        """Return, by one sum over all ranks: `sums` (fp64 scalars) over the replicas, how many ranks left out the
        update before this one, and how many wish what.

        Ranks that share a sequence's computation hold the same sums, so each is counted once for all of them.
        """
        if self._mesh.world.size == 1:
            return [self._sum(value) for value in sums], 0.0, {**own_counts(wishes)}
        vector = message((*sums, refused), wishes)
        dist.all_reduce(vector, group=self._mesh.world.group)
        totals = vector[: len(sums)] / (self._mesh.world.size // self._mesh.replicas.size)
        return list(totals), vector[len(sums)], {**counts(vector)}

    def _sum(self, value: Tensor) -> Tensor:
        """Sum `value` in place over the ranks that share the step."""
        if self._mesh.replicas.size > 1:
            dist.all_reduce(value, group=self._mesh.replicas.group)
        return value


class MicroBatchEngine(StepEngine):
    """Runs the micro-batches of a step one after another, each forwards and then backwards."""

    @abstractmethod
    def _callable(self, training: bool) -> Callable[..., Tensor]:
        """Return the model to call, set to training or evaluation."""

    @abstractmethod
    def _backward(self, loss_sum: Tensor, num_tokens: Tensor) -> None:
        """Add the gradient of loss_sum / num_tokens (of this micro-batch and the whole step) to the step's."""

    def _accumulate(self, batches: Sequence[Batch], iteration: int, num_tokens: Tensor) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        model = self._callable(training=True)
        for micro_batch, batch in enumerate(batches):
            self._rng.start_micro_batch(iteration, micro_batch)
            loss_sum += self._pass(model, batch, micro_batch, num_tokens)
        return loss_sum

    def _pass(self, model: Callable[..., Tensor], batch: Batch, micro_batch: int, num_tokens: Tensor) -> Tensor:
        """Do the forward and the backward pass of a micro-batch, and return its sum of losses."""
        enter(Phase.FORWARD, micro_batch)
        micro_sum, _ = self._objective(model, batch)
        enter(Phase.BACKWARD, micro_batch)
        self._backward(micro_sum, num_tokens)
        self._tell_loss(micro_batch, micro_sum, batch)
        return micro_sum.detach()

    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        model = self._callable(training=False)
        for micro_batch, batch in enumerate(batches):
            enter(Phase.FORWARD, micro_batch)
            micro_sum, _ = self._objective(model, batch)
            loss_sum += micro_sum
        self._callable(training=True)
        return loss_sum


def count_tokens(batches: Sequence[Batch]) -> Tensor:
    """Return the trained tokens of some micro-batches, fp64 scalar on their device."""
    return torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()


def clipped(norm: float, limit: float) -> float:
    """Return what clipping leaves of a gradient of this norm: it is divided by max(1, (norm + 1e-6) / limit)."""
    return norm / max(1.0, (norm + 1e-6) / limit) if limit > 0 else norm


def _disagreement(refused: int, world_size: int) -> EngineError:
    """Return the error of ranks that did not all decide alike on a step."""
    return EngineError(
        Problem(
            what="the last update",
            why=f"{refused} of {world_size} ranks left it out, and the others applied it, so their weights differ: a "
            "rank computed another loss or gradient norm from the same sums.",
            fix="Go on from the last checkpoint. If it happens again, look for a device that computes wrongly "
            "(check_replicas_interval: 1 names the tensors that differ).",
        )
    )
