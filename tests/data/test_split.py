"""Splits of documents: the arithmetic, and strings that cannot be meant."""

import pytest

from megatron.config.split import split_shares
from megatron.data.split import RunLength, boundaries, requested_samples


def reference_boundaries(weights: tuple[float, float, float], count: int) -> list[int]:
    fractions = [weight / sum(weights) for weight in weights]
    ends = [0]
    for fraction in fractions:
        ends.append(ends[-1] + int(round(fraction * float(count))))  # noqa: RUF046
    difference = ends[-1] - count
    return [0] + [end - difference for end in ends[1:]]


@pytest.mark.parametrize("split", ["969, 30, 1", "90,5,5", "100", "98/1/1", "0.5,0.25,0.25", "949,50,1", "1,0,0"])
def test_boundaries_follow_the_definition(split: str) -> None:
    weights = split_shares(split)
    for count in range(1, 200):
        ends = boundaries(weights, count)
        assert list(ends) == reference_boundaries(weights, count)
        assert ends[3] == count


def test_halves_are_rounded_to_even() -> None:
    assert boundaries((0.5, 0.5, 0.0), 5) == (0, 3, 5, 5)
    assert boundaries((0.5, 0.5, 0.0), 3) == (0, 1, 3, 3)


@pytest.mark.parametrize(
    ("split", "why"),
    [
        ("a, b", "is not a list of numbers"),
        ("", "is not a list of numbers"),
        ("1,2,3,4", "has 4 shares; there are three"),
        ("90,-5,5", "negative or infinite"),
        ("nan", "negative or infinite"),
        ("0,1,1", "leaves nothing to train on"),
    ],
)
def test_splits_that_cannot_be(split: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        split_shares(split)


def test_requested_samples() -> None:
    run = RunLength(train_iters=25, train_batch_size=8, eval_interval=10, eval_iters=3)
    assert requested_samples(run) == {"train": 200, "valid": 3 * 3 * 8, "test": 24}
