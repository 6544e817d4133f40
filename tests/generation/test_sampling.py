"""Sampling against its definition, and by the frequencies of many draws."""

from __future__ import annotations

import pytest
import torch

from megatron.generation.sampling import Draws, SamplingSettings, choose, draw, keep_top_k, keep_top_p


def kept_by_definition(row: list[float], top_k: int, top_p: float) -> set[int]:
    """Walk down the tokens by probability, as the papers describe it."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    order = order[:top_k] if top_k else order
    probabilities = torch.tensor([row[token] for token in order], dtype=torch.float64).softmax(0).tolist()
    kept, total = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        kept.add(token)
        total += probability
        if 0 < top_p < 1 and total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.6, 0.95, 1.0])
def test_filters_keep_what_the_definition_keeps(top_k, top_p):
    logits = torch.randn(6, 17, generator=torch.Generator().manual_seed(top_k))
    filtered = keep_top_p(keep_top_k(logits, top_k), top_p)
    for row, kept in zip(logits.tolist(), filtered.isfinite(), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == kept_by_definition(row, top_k, top_p)
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_all_zero_settings_take_the_likeliest():
    logits = torch.randn(5, 9)
    assert torch.equal(choose(logits, SamplingSettings(), Draws(0, list("abcde"))), logits.argmax(-1))


def test_top_1_and_a_tiny_top_p_are_greedy_too():
    logits = torch.randn(5, 9)
    for settings in (SamplingSettings(1.0, top_k=1), SamplingSettings(1.0, top_p=1e-6)):
        assert torch.equal(choose(logits, settings, Draws(0, list("abcde"))), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    number = 40_000
    uniform = torch.rand(number, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probabilities = (logits / temperature).softmax(0)
    tokens = draw(probabilities.expand(number, -1), uniform)
    frequencies = torch.bincount(tokens, minlength=5) / number
    sigma = (probabilities * (1 - probabilities) / number).sqrt()
    assert ((frequencies - probabilities).abs() <= 4 * sigma + 1e-9).all()
    assert frequencies[4] == 0


def test_temperature_divides_the_logits_before_the_filters():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    settings = SamplingSettings(temperature=4.0, top_p=0.5)
    names = [str(number) for number in range(500)]
    drawn = choose(logits.expand(500, -1), settings, Draws(0, names))
    assert set(drawn.tolist()) == kept_by_definition([v / 4 for v in logits[0].tolist()], 0, 0.5) == {0, 1}


def test_the_ends_of_the_unit_interval():
    probabilities = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    assert draw(probabilities, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(probabilities, torch.tensor([1 - 1e-16], dtype=torch.float64)).item() == 2
    assert draw(probabilities, torch.tensor([0.25], dtype=torch.float64)).item() == 2


def test_a_row_draws_the_same_in_any_company():
    alone = Draws(7, ["b"])
    together = Draws(7, ["a", "b", "c"])
    assert [alone.next().item() for _ in range(4)] == [together.next()[1].item() for _ in range(4)]
    assert Draws(8, ["b"]).next().item() != Draws(7, ["b"]).next().item()
