"""DeepSpeed's optimizers under our verdict: a step that they would apply is left out as they leave out an overflow.

All of them ask one function whether the gradient's norm is valid, once in a step, with the norm that is summed over
all ranks, before anything changes (DeepSpeed 0.19). Within the step that function asks the verdict as well. A step
that is left out for its limits, or for its loss, is no overflow to the fp16 loss scale.

The fp16 loss scale moves behind the step: DeepSpeed moves it before it divides the gradients by it, so that those of
each step that raises the scale would be halved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.engine.verdict import Verdict

_ASKED = "is_invalid_grad_norm"


@dataclass
class Judgement:
    """What a judged step was told. norm: of the unscaled gradient, where the optimizer left it out for the verdict.
    is_allowed: it goes on, and may ask again. is_end_of_scale: it overflowed, and fp16 has no smaller loss scale."""

    norm: float | None = None
    is_allowed: bool = False
    is_end_of_scale: bool = False


@contextmanager
def judged(optimizer: Any, verdict: Verdict, keep_scale: bool = False) -> Iterator[Judgement]:
    """Within the block, which is one step of a ZeRO optimizer or BF16_Optimizer, the verdict decides too.

    keep_scale: leave the fp16 loss scale as it is."""
    module = sys.modules[type(optimizer).__module__]
    is_invalid, found = getattr(module, _ASKED), Judgement()
    overflows: list[bool] = []
    scale = float(getattr(optimizer, "loss_scale", 1.0))

    def is_refused(norm: Any) -> bool:
        if is_invalid(norm):
            return True
        if not found.is_allowed:
            value = float(norm) / scale
            found.is_allowed = verdict.allows(value)
            found.norm = None if found.is_allowed else value
        return not found.is_allowed

    def note_overflow(has_overflow: bool = False) -> None:
        overflows.append(has_overflow and found.norm is None)

    setattr(module, _ASKED, is_refused)
    if hasattr(optimizer, "_update_scale"):
        optimizer._update_scale = note_overflow
    try:
        yield found
    finally:
        setattr(module, _ASKED, is_invalid)
        vars(optimizer).pop("_update_scale", None)
    if overflows and not keep_scale:
        found.is_end_of_scale = _move_scale(optimizer, overflows[-1])


def _move_scale(optimizer: Any, has_overflow: bool) -> bool:
    """Adjust the fp16 loss scale after a step, and return whether it overflowed at the smallest one."""
    try:
        optimizer._update_scale(has_overflow)
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        return True
    return False
