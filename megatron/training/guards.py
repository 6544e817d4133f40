"""Which steps are spikes: a rule on the losses and norms that are known, with all it knows in `GuardState`.

The limits of a step follow from the steps that were applied up to LAG before it, whenever their results were read. So
a run whose results are read late, or that was stopped and resumed in between, decides as every other does:

    loss limit = median + max(loss_deviations * 1.4826 * median |loss - median|, least_rise)
    norm limit = grad_norm_multiple * median

over the last `window` steps that were applied. A spike is not applied (`engine/verdict.py`) and never enters
the window; so losses that come to stay at a higher level are spikes for ever, and `most_in_a_row` ends the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron.config.blocks import SpikeGuard
from megatron.config.schema.training import TrainingConfig
from megatron.engine.base import NO_LIMITS, Limits, StepResult

LAG = 2
"""Steps before a step whose results its limits do not use: on a GPU they are not known when it is queued."""

_NORMAL = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""


@dataclass(frozen=True)
class Known:
    """A step that was applied: its loss, nats per token, and its gradient's norm."""

    iteration: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class LeftOut:
    """Samples that the run did not train on. reason: "not finite", "spike" or "rollback".

    iteration: the step that was the reason. Samples begin to end, end not included, in the order of the data. back_to:
    the iteration of the checkpoint that a rollback went back to, else -1.
    """

    iteration: int
    begin: int
    end: int
    reason: str
    back_to: int = -1


@dataclass(frozen=True)
class GuardState:
    """What the guards know, saved with each checkpoint.

    window: steps that were applied. not_finite_in_a_row, spikes_in_a_row: up to the last step. left_out: all samples.
    """

    window: tuple[Known, ...] = ()
    not_finite_in_a_row: int = 0
    spikes_in_a_row: int = 0
    left_out: tuple[LeftOut, ...] = ()

    def rollbacks_to(self, iteration: int) -> int:
        """Return how often the run went back to the checkpoint of an iteration."""
        return sum(each.back_to == iteration for each in self.left_out)

    @property
    def samples_left_out(self) -> int:
        """Return how many samples the run did not train on."""
        return sum(each.end - each.begin for each in self.left_out)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; floats come back as they were."""
        return {
            "window": [[each.iteration, each.loss, each.grad_norm] for each in self.window],
            "not_finite_in_a_row": self.not_finite_in_a_row,
            "spikes_in_a_row": self.spikes_in_a_row,
            "left_out": [asdict(each) for each in self.left_out],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GuardState:
        """Return what `as_dict` wrote."""
        return cls(
            tuple(Known(int(iteration), float(loss), float(norm)) for iteration, loss, norm in values["window"]),
            int(values["not_finite_in_a_row"]),
            int(values["spikes_in_a_row"]),
            tuple(LeftOut(**each) for each in values["left_out"]),
        )


@dataclass(frozen=True)
class Incident:
    """A step that was left out. kind: "not finite" or "spike". begin, end: its samples. limits: what it was beyond.
    in_a_row: how many of its kind came without a step between that was applied, this one included."""

    kind: str
    iteration: int
    begin: int
    end: int
    result: StepResult
    limits: Limits = NO_LIMITS
    in_a_row: int = 1

    def __str__(self) -> str:
        if self.kind == "spike":
            return f"the {self.excess()}"
        what = "loss" if not math.isfinite(self.result.loss) else "gradient"
        return f"the {what} is not finite (loss {self.result.loss:.4g}, gradient norm {self.result.grad_norm:.4g})"

    def excess(self) -> str:
        """Return by what it is a spike."""
        if self.result.loss > self.limits.loss:
            return f"loss {self.result.loss:.4f} is above its limit of {self.limits.loss:.4f}"
        return f"gradient norm {self.result.grad_norm:.4g} is above its limit of {self.limits.grad_norm:.4g}"


class Guards:
    """The rules of a run. training: its keys; None watches nothing."""

    def __init__(self, training: TrainingConfig | None = None) -> None:
        block = training.spike_guard if training is not None else None
        self.spikes = SpikeGuard(**block) if block else None
        self.most_not_finite = training.most_not_finite if training is not None else 0

    def limits(self, state: GuardState, iteration: int) -> Limits:
        """Return beyond what step `iteration` (counted from 1) is not applied; the same on every rank."""
        rule = self.spikes
        if rule is None:
            return NO_LIMITS
        known = [each for each in state.window if each.iteration < iteration - LAG][-rule.window :]
        if len(known) < rule.warmup_steps:
            return NO_LIMITS
        return Limits(
            loss=_loss_limit(rule, [each.loss for each in known]),
            grad_norm=_norm_limit(rule, [each.grad_norm for each in known]),
        )

    def after(
        self, state: GuardState, iteration: int, samples: tuple[int, int], result: StepResult, limits: Limits
    ) -> tuple[GuardState, Incident | None]:
        """Return what is known after a step, and what it was if it was left out.

        samples: where the step begins and ends. limits: what it was given."""
        if result.not_finite or result.spiked:
            kind = "not finite" if result.not_finite else "spike"
            state = replace(
                state,
                left_out=(*state.left_out, LeftOut(iteration, *samples, kind)),
                not_finite_in_a_row=state.not_finite_in_a_row + int(result.not_finite),
                spikes_in_a_row=state.spikes_in_a_row + int(result.spiked),
            )
            in_a_row = state.not_finite_in_a_row if result.not_finite else state.spikes_in_a_row
            return state, Incident(kind, iteration, *samples, result, limits, in_a_row)
        if result.skipped or result.num_tokens == 0:
            return state, None
        window = state.window
        if self.spikes is not None:
            known = Known(iteration, result.loss, result.grad_norm)
            window = (*window, known)[-(self.spikes.window + LAG) :]
        return replace(state, window=window, not_finite_in_a_row=0, spikes_in_a_row=0), None


def _loss_limit(rule: SpikeGuard, losses: Sequence[float]) -> float:
    if rule.loss_deviations == 0:
        return math.inf
    middle = statistics.median(losses)
    deviation = _NORMAL * statistics.median(abs(loss - middle) for loss in losses)
    return middle + max(rule.loss_deviations * deviation, rule.least_rise)


def _norm_limit(rule: SpikeGuard, norms: Sequence[float]) -> float:
    return rule.grad_norm_multiple * statistics.median(norms) if rule.grad_norm_multiple else math.inf
