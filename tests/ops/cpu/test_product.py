"""The transposed product equals fp64's at any size, in any strides, whatever the threads, and serves what it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron.ops import linear
from megatron.ops.cpu import library
from megatron.ops.cpu import product as module
from megatron.ops.cpu.product import add_product, serves

SIZES = [(1, 1, 1), (5, 12, 32), (257, 13, 33), (300, 700, 70), (256, 96, 512), (513, 97, 545)]

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def draw(depth: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return A^T [n, k] and B [k, m], neither of which lies closely."""
    generator = torch.Generator().manual_seed(depth + rows)
    left, right = (torch.randn(depth, each + 3, generator=generator)[:, :each] for each in (rows, columns))
    return left.t(), right


@pytest.mark.parametrize("size", SIZES)
def test_products_and_sums_of_them(size: tuple[int, int, int]) -> None:
    left, right = draw(*size)
    exact, bound = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    room = torch.full((len(left) + 1, right.shape[1] + 5), float("nan"))
    found = add_product(room[:-1, :-5], left, right, is_first=True)
    allowed = 2**-24 * (size[0] ** 0.5 + 4) * bound  # of rounding that does not all go one way
    assert (found.double() - exact).abs().le(allowed).all()
    add_product(found, left, right, is_first=False)
    assert (found.double() - 2 * exact).abs().le(4 * allowed).all()
    assert room[-1].isnan().all()
    assert room[:, -5:].isnan().all()


def test_threads_change_no_bit() -> None:
    left, right = draw(300, 500, 600)
    found = []
    for number in (1, 2):
        with threads(number):
            found.append(add_product(torch.empty(500, 600), left, right, is_first=True))
    assert torch.equal(*found)


def test_values_that_are_no_numbers_stay_in_their_row() -> None:
    left, right = draw(20, 30, 40)
    left = left.clone(memory_format=torch.preserve_format)
    left[7, 3] = float("inf")
    found = add_product(torch.empty(30, 40), left, right, is_first=True)
    assert not found[7].isfinite().any()
    assert found[torch.arange(30) != 7].isfinite().all()


def test_only_fp32_with_a_transposed_left_factor_is_served() -> None:
    left, right = draw(64, 500, 48)
    with threads(1):
        assert serves(left, right)
        assert not serves(left.contiguous(), right)
        assert not serves(left, right.t().contiguous().t())
        assert not serves(left.bfloat16(), right.bfloat16())
        assert not serves(left[:95], right)
        assert not serves(left, right[:1].expand(64, 48))


@pytest.mark.parametrize("serving", [True, False])
def test_gradients_of_a_weight_are_ours_where_this_processor_gains(
    monkeypatch: pytest.MonkeyPatch, serving: bool
) -> None:
    monkeypatch.setattr(linear, "onednn_wins", lambda: serving)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    left, right = draw(64, 500, 48)
    calls: list[int] = []
    monkeypatch.setattr(linear, "add_product", lambda *args, **keys: calls.append(1) or add_product(*args, **keys))
    exact = (left.double() @ right.double()).float()
    with threads(1):
        torch.testing.assert_close(linear.product(left, right), exact, rtol=1e-5, atol=1e-5)
        total = torch.full((500, 48), float("nan"))
        linear.accumulate_product(total, left, right, is_first=True)
        linear.accumulate_product(total, left, right, is_first=False)
    torch.testing.assert_close(total, 2 * exact, rtol=1e-5, atol=1e-5)
    assert len(calls) == (3 if serving else 0)


def test_where_there_is_no_library_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_ready", lambda device: "no compiler")
    assert not serves(*draw(64, 500, 48))
