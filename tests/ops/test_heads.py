"""Heads copied apart and turned on a CPU equal those of slicing, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.heads import split_heads, split_heads_reference
from megatron.ops.rotary import rotary_tables

BATCH, LENGTH, DIM = 2, 7, 10
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def draw(num_groups: int, group_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Return groups [b, s, k, n/k + 2, d] and weights for query, key and value, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(BATCH, LENGTH, num_groups, group_size + 2, DIM, generator=generator).to(dtype)
    heads = (num_groups * group_size, num_groups, num_groups)
    weights = [torch.randn(BATCH, count, LENGTH, DIM, generator=generator).to(dtype) for count in heads]
    return [groups.requires_grad_(), *weights]


def tables(dim: int, by_row: bool) -> tuple[Tensor, Tensor]:
    """Return the tables of positions 3, 4, ..., or of other positions in each row."""
    positions = torch.arange(3, 3 + LENGTH)
    if by_row:
        positions = torch.stack([positions, positions * 5])
    cos, sin = rotary_tables(positions, dim, base=10000)
    return cos[..., None, None, :], sin[..., None, None, :]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("num_groups", "group_size", "dim"), [(3, 1, 4), (2, 3, 10), (1, 4, 2)])
def test_it_equals_slicing(dtype: torch.dtype, by_row: bool, num_groups: int, group_size: int, dim: int) -> None:
    ours, *weights = draw(num_groups, group_size, dtype)
    theirs = draw(num_groups, group_size, dtype)[0]
    for groups, function in ((ours, split_heads), (theirs, split_heads_reference)):
        heads = function(groups, *tables(dim, by_row))
        assert [part.dtype for part in heads] == [dtype] * 3
        sum((part * weight).float().square().sum() for part, weight in zip(heads, weights, strict=True)).backward()
        if function is split_heads:
            found = heads
    for part, expected in zip(found, heads, strict=True):
        torch.testing.assert_close(part, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    error = (ours.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
    assert error < TOLERANCES[dtype]


def test_gradients_of_any_layout_and_of_one_part() -> None:
    """Upstream gradients that are expanded, transposed or absent."""
    for reduce in (
        lambda query, key, value: query.sum() + key.sum() + value.sum(),
        lambda query, key, value: (query.transpose(1, 2).flatten(2) @ torch.ones(3 * DIM, 1)).sum(),
        lambda query, key, value: value.square().sum(),
    ):
        ours, theirs = (draw(3, 1, torch.float32)[0] for _ in range(2))
        reduce(*split_heads(ours, *tables(4, False))).backward()
        reduce(*split_heads_reference(theirs, *tables(4, False))).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_the_projection_itself_is_left_alone() -> None:
    groups = draw(3, 1, torch.float32)[0]
    before = groups.detach().clone()
    split_heads(groups, *tables(10, False))
    assert torch.equal(groups.detach(), before)


def test_without_tables_nothing_is_turned() -> None:
    groups = draw(2, 3, torch.float32)[0]
    query, key, value = split_heads_reference(groups, None, None)
    assert torch.equal(query[:, 4], groups[:, :, 1, 1])
    assert torch.equal(key[:, 1], groups[:, :, 1, 3])
    assert torch.equal(value[:, 1], groups[:, :, 1, 4])
