"""The batch triangle against its definition, for every small case."""

from __future__ import annotations

from itertools import product

import pytest

from megatron.config.batch import Contradiction, Triangle, complete
from tests.config.small import problems

NUMBERS = (None, 1, 2, 3, 4, 6, 8, 12)


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_every_case_is_whole_or_refused_for_a_reason(dp: int) -> None:
    for train, micro, steps in product(NUMBERS, repeat=3):
        result = complete(train, micro, steps, dp)
        given = [pair for pair in zip((train, micro, steps), _members(result), strict=True) if pair[0] is not None]
        if isinstance(result, Triangle):
            assert result.train_batch_size == result.train_micro_batch_size_per_gpu * dp * (
                result.gradient_accumulation_steps
            )
            assert all(wanted == found for wanted, found in given)
        else:
            assert train is not None
            assert train % ((micro or 1) * (steps or 1) * dp) or None not in (micro, steps)


def _members(result: Triangle | Contradiction) -> tuple[int | None, ...]:
    if isinstance(result, Contradiction):
        return (None, None, None)
    return (result.train_batch_size, result.train_micro_batch_size_per_gpu, result.gradient_accumulation_steps)


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ((1536, 4, None), (1536, 4, 32)),
        ((None, 4, 32), (1536, 4, 32)),
        ((1536, None, 32), (1536, 4, 32)),
        ((24, None, None), (24, 2, 1)),
        ((None, 4, None), (48, 4, 1)),
        ((None, None, None), (12, 1, 1)),
        ((1536, 4, 32), (1536, 4, 32)),
    ],
)
def test_the_missing_member_is_derived(given: tuple[int | None, ...], whole: tuple[int, ...]) -> None:
    assert complete(*given, dp=12) == Triangle(*whole)


def test_the_messages() -> None:
    said = problems(train_batch_size=7, train_micro_batch_size_per_gpu=2, world=2)
    assert said == (
        "train_batch_size = 7: it is not a multiple of train_micro_batch_size_per_gpu (2) x 2 data parallel processes "
        "(= 4). Set train_batch_size to 4 or 8."
    )
    said = problems(train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=3)
    assert said == (
        "train_batch_size = 8: it is not train_micro_batch_size_per_gpu (2) x gradient_accumulation_steps (3) x 1 data "
        "parallel process (= 6). Set train_batch_size to 6, or remove one of the three keys to have it derived."
    )
    said = problems(train_batch_size=2, world=4)
    assert "gradient_accumulation_steps (1) x 4 data parallel processes (= 4). Set train_batch_size to 4." in said
