"""Bounds, masks and biases say the same of what tokens see, and are made once."""

from __future__ import annotations

import pytest
import torch

from megatron.ops.sight import Sight

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 9 + [2], [5] * 13 + [0]])
SIGHTS = {
    "causal": Sight(1.0),
    "window": Sight(1.0, window=3),
    "itself": Sight(1.0, window=0),
    "documents": Sight(1.0, segments=DOCUMENTS),
    "padding": Sight(1.0, padding=torch.tensor([0, 6])),
    "everything": Sight(1.0, window=5, segments=DOCUMENTS, padding=torch.tensor([2, 5])),
    "full": Sight(1.0, causal=False),
    "full documents": Sight(1.0, segments=DOCUMENTS, causal=False),
}


@pytest.mark.parametrize("queries", [14, 5, 1])
@pytest.mark.parametrize("name", SIGHTS)
def test_bounds_say_what_the_mask_says(name: str, queries: int) -> None:
    sight, columns = SIGHTS[name], torch.arange(14)
    seen = sight.seen(columns[14 - queries :], columns).expand(2, 1, queries, 14)[:, 0]
    first, last, begin, end = (each.unsqueeze(-1) for each in sight.bounds(queries, 14, CPU))
    assert torch.equal(((columns >= first) & (columns <= last)).expand_as(seen), seen)
    rows = torch.arange(queries)
    assert torch.equal(((rows >= begin) & (rows <= end)).expand(2, 14, queries), seen.transpose(1, 2))
    mask = sight.mask(queries, 14, CPU)
    assert seen.all() if mask is None else torch.equal(mask.expand(2, 1, queries, 14)[:, 0], seen)
    for bound in (first, last, begin, end):
        assert (bound.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("name", ["causal", "window", "documents", "everything"])
def test_bounds_of_tokens_that_lie_apart(name: str) -> None:
    """As on a context axis, where a rank has two chunks of the sequence."""
    sight = SIGHTS[name]
    queries, keys = torch.tensor([2, 3, 4, 11, 12, 13]), torch.tensor([0, 1, 5, 6, 9, 10])
    seen = sight.seen(queries, keys).expand(2, 1, 6, 6)[:, 0]
    first, last, begin, end = (each.unsqueeze(-1) for each in sight.bounds_of(queries, keys))
    columns = torch.arange(6)
    assert torch.equal(((columns >= first) & (columns <= last)).expand_as(seen), seen)
    assert torch.equal(((columns >= begin) & (columns <= end)).expand_as(seen), seen.transpose(1, 2))


def test_what_is_added_is_the_bias_where_seen() -> None:
    slopes, table = torch.tensor([0.5, 0.25]), torch.randn(2, 14, 14)
    for slope, bias in ((slopes, None), (None, table), (slopes, table)):
        sight = Sight(1.0, window=3, slopes=slope, segments=DOCUMENTS, bias=bias)
        columns = torch.arange(14)
        wanted = torch.zeros(2, 14, 14) if bias is None else bias
        wanted = wanted if slope is None else wanted - slope.view(2, 1, 1) * (columns[:, None] - columns)
        wanted = wanted.masked_fill(~sight.seen(columns, columns), float("-inf"))
        torch.testing.assert_close(sight.added(14, 14, CPU, torch.float32), wanted)
    assert Sight(1.0).added(1, 14, CPU, torch.float32) is None


def test_documents_laid_end_to_end() -> None:
    assert Sight(1.0, segments=DOCUMENTS).document_starts().tolist() == [0, 4, 13, 14, 27, 28]


def test_what_generation_made_serves_training() -> None:
    sight = Sight(1.0, window=3)
    with torch.inference_mode():
        mask, bounds = sight.mask(14, 14, CPU), sight.bounds(14, 14, CPU)
    assert mask is not None
    assert not mask.is_inference()
    assert sight.mask(14, 14, CPU) is mask
    assert sight.bounds(14, 14, CPU) is bounds
    assert sight.mask(13, 14, CPU) is not mask


def test_a_window_is_causal() -> None:
    with pytest.raises(AssertionError, match="window and padding are causal"):
        Sight(1.0, window=3, causal=False)
