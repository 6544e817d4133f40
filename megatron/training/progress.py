"""How far a run has come: the only state of the loop, saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Counts since the beginning of a run, whatever the topology.

    iteration: optimizer steps taken.
    consumed_samples: training samples read; the data position of the next step.
    consumed_tokens: tokens that were trained on, masked ones left out.
    skipped_iterations: steps whose update was dropped for a non-finite fp16 gradient.
    owes_validation: the validation that is due after this iteration has still to be made, since the run was stopped.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    owes_validation: bool = False

    def after_step(self, samples: int) -> Progress:
        """Return the progress after one more step over `samples` samples, of which nothing else is known yet."""
        return replace(self, iteration=self.iteration + 1, consumed_samples=self.consumed_samples + samples)

    def after_result(self, tokens: int, skipped: bool) -> Progress:
        """Return the progress once it is known that a step trained on `tokens` tokens, and whether it was skipped."""
        return replace(
            self,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_iterations=self.skipped_iterations + int(skipped),
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counts as a checkpoint's manifest holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """Return the progress that a manifest holds; one of an earlier version owes nothing."""
        counts = {name: int(values[name]) for name in asdict(cls()) if name != "owes_validation"}
        return cls(**counts, owes_validation=bool(values.get("owes_validation")))
