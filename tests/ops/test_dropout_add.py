"""The formula's random numbers are Philox's, and dropout keeps the share and the mean that it should."""

from __future__ import annotations

import torch

from megatron.ops.dropout_add import add_dropped, kept, new_seed, philox, threshold


def words(column: int, row: int, seed: int, rounds: int) -> list[int]:
    found = philox(torch.tensor([column]), torch.tensor([row]), torch.tensor([seed]), rounds)
    return [int(word) for word in found]


def test_the_known_answer_of_philox() -> None:
    """From Random123's kat_vectors: philox4x32 with 10 and with 7 rounds of counter 0 and key 0."""
    assert words(0, 0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0, 0, 0, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_an_element_is_kept_with_the_probability_asked_for() -> None:
    for probability in (0.0, 0.1, 0.5, 0.9):
        share = kept(1000, 100, probability, torch.tensor([7])).float().mean()
        assert abs(share - (1 - probability)) < 0.005
    assert threshold(0.25) == 2**30


def test_masks_of_rows_columns_and_seeds_are_independent() -> None:
    one, other = (kept(64, 64, 0.5, torch.tensor([seed])).float() * 2 - 1 for seed in (1, 2))
    assert abs((one * other).mean()) < 0.06
    assert abs((one[1:] * one[:-1]).mean()) < 0.06
    assert abs((one[:, 1:] * one[:, :-1]).mean()) < 0.06
    assert abs((one[:, :16] * one[:, 16:32]).mean()) < 0.12


def test_without_a_seed_it_is_dropout_of_the_sum() -> None:
    hidden, bias, residual = torch.randn(40, 50), torch.randn(50), torch.randn(40, 50)
    output = add_dropped(hidden, bias, residual, 0.5) - residual
    kept_values = output.abs() > 1e-5
    torch.testing.assert_close(output[kept_values], 2 * (hidden + bias)[kept_values], rtol=1e-4, atol=1e-5)
    assert 0.4 < kept_values.float().mean() < 0.6


def test_a_seed_is_drawn_from_the_generator() -> None:
    torch.manual_seed(3)
    first = new_seed(torch.device("cpu"))
    second = new_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, new_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
