"""How far a run has come: the only state of the loop, saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.training.guards import GuardState

_COUNTS = ("iteration", "consumed_samples", "consumed_tokens", "skipped_iterations")


@dataclass(frozen=True)
class Progress:
    """Counts since the beginning of a run, whatever the topology.

    iteration: optimizer steps taken.
    consumed_samples: training samples read; the data position of the next step.
    consumed_tokens: tokens that were trained on, masked ones left out.
    skipped_iterations: steps whose update was left out: not finite, or a spike.
    owes_validation: the validation that is due after this iteration has still to be made, since the run was stopped.
    guard: what the guards of the loss know and have decided.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    owes_validation: bool = False
    guard: GuardState = field(default_factory=GuardState)

    def after_step(self, samples: int) -> Progress:
        """Return the progress after one more step over `samples` samples, of which nothing else is known yet."""
        return replace(self, iteration=self.iteration + 1, consumed_samples=self.consumed_samples + samples)

    def after_result(self, tokens: int, skipped: bool, guard: GuardState | None = None) -> Progress:
        """Return the progress once it is known that a step trained on `tokens` tokens, and whether it was skipped.

        guard: what the guards know now; None where nothing is guarded."""
        return replace(
            self,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_iterations=self.skipped_iterations + int(skipped),
            guard=self.guard if guard is None else guard,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as a checkpoint's manifest holds it."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "owes_validation": self.owes_validation, "guard": self.guard.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """Return the progress that a manifest holds; one of an earlier version owes nothing, and knows of no guards."""
        guard = GuardState.from_dict(values["guard"]) if "guard" in values else GuardState()
        counts = {name: int(values[name]) for name in _COUNTS}
        return cls(**counts, owes_validation=bool(values.get("owes_validation")), guard=guard)
