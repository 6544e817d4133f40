"""The guard of the first steps after a load: what ends a run, and what must not."""

from __future__ import annotations

import math

import pytest

from megatron.engine.base import StepResult
from megatron.errors import EngineError
from megatron.training.after_load import AfterLoad

VOCABULARY = 50_304  # ln = 10.8
MANY, FEW = 100_000, 6


def looked(*losses: float, tokens: int = MANY, spiked: tuple[int, ...] = ()) -> int | None:
    """Return the iteration at which the run ends, or None."""
    guard = AfterLoad(VOCABULARY, "checkpoints/global_step7")
    for place, loss in enumerate(losses):
        num_tokens = 0 if loss == 0 else tokens
        result = StepResult(loss, num_tokens, 1e-4, 1.0, 1.0, skipped=place in spiked, spiked=place in spiked)
        try:
            guard.look(8 + place, result)
        except EngineError:
            return 8 + place
    return None


@pytest.mark.parametrize("losses", [(2.1, 10.9, 10.8), (2.1, 2.0, 11.0, 11.5), (5.0, 9.0, 9.1)])
def test_weights_that_have_gone_end_the_run(losses: tuple[float, ...]) -> None:
    assert looked(*losses) == 7 + len(losses)


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ((2.1, 10.9, 2.1, 10.9), "one bad batch, and another"),
        ((2.1, 2.2, 2.3, 2.2, 10.9, 10.9), "it came later, so the optimizer's masters are not to blame"),
        ((2.1, 4.5, 4.4, 4.6), "other data, and far from a guess at random"),
        ((10.9, 11.5, 11.4, 11.3), "a model that knew nothing"),
        ((10.0, 11.9, 11.9, 11.9), "less than 2 nats"),
        ((2.1, math.nan, math.nan, math.nan), "not finite, which another guard sees"),
        ((0, 10.9, 10.9, 10.9), "the first step trained on nothing"),
    ],
)
def test_what_is_something_else_does_not(losses: tuple[float, ...], why: str) -> None:
    assert looked(*losses) is None, why


def test_the_message_has_the_numbers() -> None:
    guard = AfterLoad(VOCABULARY, "checkpoints/global_step7")
    for iteration, loss in enumerate((2.1, 10.9), start=8):
        guard.look(iteration, StepResult(loss, MANY, 1e-4, 1.0, 1.0))
    said = r"loss 10\.900 at iteration 10: it was 2\.100 with the weights of checkpoints/global_step7"
    with pytest.raises(EngineError, match=said):
        guard.look(10, StepResult(10.9, MANY, 1e-4, 1.0, 1.0))


def test_few_tokens_are_no_evidence() -> None:
    losses = (6.0, 9.5, 9.5, 9.5)
    assert looked(*losses) == 10
    assert looked(*losses, tokens=FEW) is None


def test_steps_that_were_left_out_say_nothing() -> None:
    assert looked(2.1, 10.9, 10.9, 10.9) == 10
    assert looked(2.1, 10.9, 10.9, 2.2, spiked=(1, 2)) is None
