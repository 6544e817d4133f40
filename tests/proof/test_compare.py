"""Comparisons: what counts as rounding, what does not, and where a difference is said to lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.parallel.sharding import ShardSpec
from megatron.proof.compare import ALLOWED, compare
from megatron.proof.trace import Gradient, Trace


def trace() -> Trace:
    generator = torch.Generator().manual_seed(0)
    gradients = {
        "layers.0.mlp.linear1.weight": Gradient(torch.randn(8, 4, generator=generator), ShardSpec(dim=0, blocks=2), 1),
        "layers.0.norm.weight": Gradient(torch.randn(4, generator=generator), ShardSpec(), 0),
    }
    return Trace([4.0], [2.0], [1.0], [gradients])


def changed(name: str, index: tuple[int, ...], by: float) -> Trace:
    whole = trace()
    gradient = whole.gradients[0][name]
    full = gradient.full.clone()
    full[index] += by
    return replace(whole, gradients=[{**whole.gradients[0], name: replace(gradient, full=full)}])


def test_equal_traces_pass() -> None:
    found = compare(trace(), trace(), "fp32", 2)
    assert [comparison.error for comparison in found] == [0.0] * 5
    assert all(comparison.passes for comparison in found)


@pytest.mark.parametrize(
    ("row", "owner"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (6, 1), (7, 1)]
)  # 2 blocks of 4 rows, each of which 2 ranks share
def test_the_share_of_the_largest_difference_is_named(row: int, owner: int) -> None:
    name = "layers.0.mlp.linear1.weight"
    (wrong,) = [c for c in compare(changed(name, (row, 3), 0.5), trace(), "fp32", 2) if not c.passes]
    assert wrong.name == f"gradient of {name}"
    assert wrong.where == f"most at [{row}, 3], stage 1, tensor rank {owner}"


def test_rounding_is_allowed_and_more_is_not() -> None:
    for precision, (of_numbers, of_gradients) in ALLOWED.items():
        near, far = (replace(trace(), losses=[4.0 * (1 + factor * of_numbers)]) for factor in (0.9, 1.1))
        assert all(c.passes for c in compare(near, trace(), precision, 1))
        assert [c.name for c in compare(far, trace(), precision, 1) if not c.passes] == ["loss"]
        norm = float(trace().gradients[0]["layers.0.norm.weight"].full.norm())
        far = changed("layers.0.norm.weight", (0,), 1.2 * of_gradients * norm)
        assert len([c for c in compare(far, trace(), precision, 1) if not c.passes]) == 1


def test_nan_and_what_is_missing_never_pass() -> None:
    assert not all(c.passes for c in compare(replace(trace(), losses=[float("nan")]), trace(), "bf16", 1))
    assert not all(c.passes for c in compare(changed("layers.0.norm.weight", (1,), float("nan")), trace(), "bf16", 1))
    less = replace(trace(), gradients=[{}])
    for ours, theirs in ((less, trace()), (trace(), less)):
        assert len([c for c in compare(ours, theirs, "fp32", 1) if not c.passes]) == 2
