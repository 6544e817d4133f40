"""Heads that are copied apart and turned in one pass equal those of the formula, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import rotary
from megatron.ops.cpu import library
from megatron.ops.cpu.rotary import rotate_packed

TOLERANCES = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(8, 1, 64, 16), (2, 3, 10, 10), (3, 1, 80, 20), (1, 2, 64, 64), (2, 2, 6, 2), (2, 1, 130, 100)]
"""Key-value heads, queries of each, features, and how many of them are turned."""

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def draw(groups: int, heads: int, dim: int, length: int = 9) -> list[Tensor]:
    """Return packed [b, s, k, g + 2, d] and gradients of query, key and value [b, s, n, d] as attention has them."""
    generator = torch.Generator().manual_seed(dim)
    shapes = [(2, heads * groups, length, dim), *[(2, groups, length, dim)] * 2]
    upstream = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    return [torch.randn(2, length, groups, heads + 2, dim, generator=generator), *upstream]


def tables(dim: int, by_row: bool, length: int = 9) -> tuple[Tensor, Tensor]:
    """Return the tables of positions 3, 4, ..., or of other positions in each row."""
    positions = torch.arange(3, 3 + length)
    cos, sin = rotary.rotary_tables(torch.stack([positions, positions * 5]) if by_row else positions, dim, 10000.0)
    return cos[..., None, None, :], sin[..., None, None, :]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("groups", "heads", "dim", "turned"), SHAPES)
def test_it_equals_the_formula(
    dtype: torch.dtype, by_row: bool, groups: int, heads: int, dim: int, turned: int
) -> None:
    packed, *upstream = (each.to(dtype) for each in draw(groups, heads, dim))
    leaf, exact = packed.requires_grad_(), packed.detach().double().requires_grad_()
    cos, sin = tables(turned, by_row)
    found = rotate_packed(leaf, cos, sin)
    expected = rotary.rotate_packed(exact, cos.double(), sin.double())
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    (wanted,) = torch.autograd.grad(expected, exact, [each.double() for each in upstream])
    for one, other in zip((*found, gradient), (*expected, wanted), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert torch.equal(found[2], packed[:, :, :, heads + 1]), "values are copied as they are"


def test_in_memory_positions_of_a_head_follow_each_other() -> None:
    query, key, value = rotate_packed(draw(2, 3, 16)[0], *tables(8, False))
    assert all(part.transpose(1, 2).is_contiguous() for part in (query, key, value))


def test_any_layout_and_a_single_gradient() -> None:
    packed, *_ = draw(3, 1, 16)
    apart = torch.zeros(2, 9, 3, 3, 40)[..., 5:21].copy_(packed)
    for use in (
        lambda query, key, value: query.sum() + key.sum() + value.sum(),
        lambda query, key, value: value.square().sum(),
        lambda query, key, value: (query.transpose(2, 3) * torch.arange(16.0)[:, None]).sum(),
    ):
        gradients = []
        for function in (rotate_packed, rotary.rotate_packed):
            leaf = apart.detach().requires_grad_()
            gradients.append(torch.autograd.grad(use(*function(leaf, *tables(16, False))), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_what_is_not_turned_keeps_what_is_no_number() -> None:
    packed = draw(1, 1, 16)[0]
    packed[..., 12:] = float("inf")
    query, _, _ = rotate_packed(packed, *tables(8, False))
    assert torch.equal(query[..., 8:], packed[:, :, :, 0, 8:])
    assert query[..., :8].isfinite().all()


def test_threads_change_nothing() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed, *upstream = draw(2, 2, 64, 150)
            heads = rotate_packed(packed.requires_grad_(), *tables(16, False, 150))
            results.append([*heads, *torch.autograd.grad(heads, packed, upstream)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_compiled_or_in_fp64_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.ops.cpu.rotary.kernel", None)
    packed, cos, sin = draw(2, 1, 8)[0], *tables(8, False)
    compiled = torch.compile(rotate_packed, backend="eager", fullgraph=True)
    expected = rotary.rotate_packed(packed, cos, sin)
    for function, inputs in ((compiled, packed), (rotate_packed, packed.double())):
        for one, other in zip(function(inputs, cos, sin), expected, strict=True):
            torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-5)


def test_tables_of_one_token_are_not_read_beyond_their_end() -> None:
    packed, table = torch.randn(2, 6, 2, 4, 16), torch.randn(1, 1, 1, 4)
    found, wanted = rotate_packed(packed, table, table), rotary.rotate_packed(packed, table, table)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
