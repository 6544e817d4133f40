"""Whether the weights that a run loaded are still there after its first updates.

Losses of the first steps after a load are those of the loaded weights, and of what the first updates make of them.
An optimizer that kept masters of its own from before the load would write those over the weights at its first update,
and the loss would go to that of a model that was never trained. So a run ends where, in two steps in a row of the three
behind the first, the loss

    - is above the first one's by 2 nats per token, and by 4 sqrt(1/n + 1/m) more, n and m the tokens of the two
    - and is 3/4 of ln(vocabulary) or more, near a guess at random

The first loss is of the same data and learning rate, so neither new data nor a warm-up is mistaken for this, and a loss
that was bad from the start is none. A batch that is bad by itself comes once; few tokens make the bound wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron.engine.base import StepResult
from megatron.errors import EngineError, Problem

STEPS = 3
"""Steps behind the first that are looked at."""

IN_A_ROW = 2
"""Steps that must have lost the weights: one alone may be a bad batch."""

RISE = 2.0
"""Nats per token."""

_SPREAD = 4.0
"""Nats; about the spread of single tokens' losses, with room for tokens of one text that are alike."""

_NEAR_RANDOM = 0.75


@dataclass
class AfterLoad:
    """Looks at the first steps after a load. vocab_size: rows of the word embedding. source: what was loaded."""

    vocab_size: int
    source: str
    _first: StepResult | None = field(default=None, init=False)
    _left: int = field(default=STEPS, init=False)
    _in_a_row: int = field(default=0, init=False)

    def look(self, iteration: int, result: StepResult) -> None:
        """Raise EngineError, on all ranks alike, where the weights have gone. iteration: counted from 1.

        Steps that trained on nothing, or that were left out as spikes, say nothing; nor does what is not finite."""
        if self._left == 0 or result.num_tokens == 0 or result.spiked or not math.isfinite(result.loss):
            return
        if self._first is None:
            self._first = result
            return
        self._left -= 1
        self._in_a_row = self._in_a_row + 1 if self._has_gone(self._first, result) else 0
        if self._in_a_row == IN_A_ROW:
            raise self._error(iteration, self._first, result)

    def _has_gone(self, first: StepResult, result: StepResult) -> bool:
        uncertain = _SPREAD * math.sqrt(1 / first.num_tokens + 1 / result.num_tokens)
        is_random = result.loss >= _NEAR_RANDOM * math.log(self.vocab_size)
        return is_random and result.loss > first.loss + RISE + uncertain

    def _error(self, iteration: int, first: StepResult, result: StepResult) -> EngineError:
        return EngineError(
            Problem(
                what=f"loss {result.loss:.3f} at iteration {iteration}",
                why=f"it was {first.loss:.3f} with the weights of {self.source} as they were loaded, and is now near "
                f"that of a guess at random, {math.log(self.vocab_size):.2f}: the loaded weights were probably "
                "overwritten, by an optimizer that kept masters from before the load; or a learning rate of "
                f"{first.learning_rate:.2e} destroyed them in {STEPS - self._left} steps.",
                fix="Load the weights alone (finetune: true, or no_load_optim: true) to see which: if the loss stays, "
                "the optimizer's state of the checkpoint does not belong to its weights; if it jumps again, set a "
                "smaller learning rate or a longer warmup. If neither helps, this is a defect of the engine: report "
                "it with the configuration. Checkpoints that this run has saved since are spoilt.",
            )
        )
