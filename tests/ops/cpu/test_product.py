"""Products equal fp64's at any size, in any strides, whatever the threads, and serve what they can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron.ops import linear
from megatron.ops.cpu import library
from megatron.ops.cpu import product as module
from megatron.ops.cpu.product import multiply, serves

SIZES = [
    (1, 1, 1),
    (12, 32, 5),
    (13, 33, 257),
    (700, 70, 300),
    (96, 512, 256),
    (97, 769, 513),
    (20, 40, 1541),
    (1030, 6200, 3),
]
TURNED = [(False, False), (False, True), (True, False), (True, True)]

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


def draw(rows: int, columns: int, depth: int, turned: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Return A [n, k] and B [k, m], which are transposed views where `turned`, and neither of which lies closely."""
    generator = torch.Generator().manual_seed(depth + rows)

    def matrix(high: int, wide: int, is_turned: bool) -> Tensor:
        shape = (wide, high) if is_turned else (high, wide)
        values = torch.randn(shape[0], shape[1] + 3, generator=generator)[:, : shape[1]]
        return values.t() if is_turned else values

    return matrix(rows, depth, turned[0]), matrix(depth, columns, turned[1])


@pytest.mark.parametrize("turned", TURNED)
@pytest.mark.parametrize("size", SIZES)
def test_products_and_sums_of_them(size: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    left, right = draw(*size, turned)
    exact, bound = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    room = torch.full((len(left) + 1, right.shape[1] + 5), float("nan"))
    found = multiply(room[:-1, :-5], left, right)
    allowed = 2**-24 * (size[2] ** 0.5 + 4) * bound  # of rounding that does not all go one way
    assert (found.double() - exact).abs().le(allowed).all()
    multiply(found, left, right, adds=True)
    assert (found.double() - 2 * exact).abs().le(4 * allowed).all()
    assert room[-1].isnan().all()
    assert room[:, -5:].isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_a_bias_is_added_to_each_row(size: tuple[int, int, int]) -> None:
    left, right = draw(*size, (False, True))
    bias = torch.randn(size[1], generator=torch.Generator().manual_seed(1))
    plain = multiply(torch.empty(size[:2]), left, right)
    found = multiply(torch.empty(size[:2]), left, right, bias)
    torch.testing.assert_close(found, plain + bias, rtol=0, atol=0 if size[2] <= 768 else 1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_the_sums_of_the_left_factors_rows(size: tuple[int, int, int]) -> None:
    left, right = draw(*size, (True, False))
    room = torch.full((size[0] + 1,), float("nan"))
    multiply(torch.empty(size[:2]), left, right, sums=room[:-1])
    torch.testing.assert_close(room[:-1].double(), left.double().sum(1), rtol=1e-5, atol=1e-5)
    assert room[-1].isnan()


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("turned", TURNED)
def test_threads_change_no_bit(turned: tuple[bool, bool], is_read: bool) -> None:
    left, right = draw(500, 608, 800 if is_read else 300, turned)
    found = []
    for number in (1, 2):
        with threads(number):
            sums = torch.empty(500) if turned[0] else None
            found.append((multiply(torch.empty(500, 608), left, right, sums=sums, is_read=is_read), sums))
    assert torch.equal(found[0][0], found[1][0])
    assert sums is None or torch.equal(found[0][1], found[1][1])


def test_what_is_not_needed_soon_is_the_same() -> None:
    left, right = draw(200, 96, 70, (True, False))
    room = torch.full((200, 112), float("nan"))
    found = multiply(room[:, :96], left, right, is_read=False)
    assert torch.equal(found, multiply(torch.empty(200, 96), left, right))
    assert room[:, 96:].isnan().all()
    uneven = torch.full((200, 97), float("nan"))  # rows that begin anywhere
    assert torch.equal(multiply(uneven[:, :96], left, right, is_read=False), found)
    assert uneven[:, 96].isnan().all()


@pytest.mark.parametrize("turned", TURNED)
def test_a_row_depends_on_no_other(turned: tuple[bool, bool]) -> None:
    left, right = draw(100, 100, 900, turned)
    whole = multiply(torch.empty(100, 100), left, right)
    for count in (1, 17, 56):
        assert torch.equal(multiply(torch.empty(count, 100), left[:count], right), whole[:count])


@pytest.mark.parametrize("turned", TURNED)
def test_values_that_are_no_numbers_stay_in_their_row(turned: tuple[bool, bool]) -> None:
    left, right = draw(30, 40, 20, turned)
    left = left.clone(memory_format=torch.preserve_format)
    left[7, 3] = float("inf")
    found = multiply(torch.empty(30, 40), left, right)
    assert not found[7].isfinite().any()
    assert found[torch.arange(30) != 7].isfinite().all()


def test_what_is_served() -> None:
    left, right = draw(500, 96, 64, (True, False))
    with threads(1):
        assert serves(left, right)
        assert serves(left.contiguous(), right.t().contiguous().t())
        assert serves(left, right[:1].expand(64, 96))
        assert not serves(left.bfloat16(), right.bfloat16())
        assert not serves(left[:95], right)
        assert not serves(left[:, :0], right[:0])  # nothing to copy
        assert not serves(left, right[:, ::2])
        assert not serves(left, right[:63])
        assert not serves(left[:300], right)  # fewer results than a thread is worth


@pytest.mark.parametrize("serving", [True, False])
def test_products_are_ours_where_this_processor_gains(monkeypatch: pytest.MonkeyPatch, serving: bool) -> None:
    monkeypatch.setattr(linear, "onednn_wins", lambda: serving)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    calls: list[int] = []
    monkeypatch.setattr(linear, "multiply", lambda *args, **keys: calls.append(1) or multiply(*args, **keys))
    for turned in TURNED:
        left, right = draw(500, 112, 64, turned)
        exact = (left.double() @ right.double()).float()
        with threads(1):
            torch.testing.assert_close(linear.product(left, right), exact, rtol=1e-5, atol=1e-5)
            total = torch.full((500, 112), float("nan"))
            linear.accumulate_product(total, left, right, is_first=True)
            linear.accumulate_product(total, left, right, is_first=False)
            torch.testing.assert_close(
                linear.product_into(torch.empty(500, 112), left, right), exact, rtol=1e-5, atol=1e-5
            )
        torch.testing.assert_close(total, 2 * exact, rtol=1e-5, atol=1e-5)
    assert len(calls) == (16 if serving else 0)


def test_what_lies_transposed_is_filled_and_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_wins", lambda: True)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    left, right = draw(500, 112, 64, (True, False))
    exact, total = (left.double() @ right.double()).float(), torch.full((112, 500), float("nan")).t()
    with threads(1):
        assert serves(left, right)
        linear.accumulate_product(total, left, right, is_first=True)
        linear.accumulate_product(total, left, right, is_first=False)
        output = linear.product_into(torch.full((112, 500), float("nan")).t(), left, right)
    torch.testing.assert_close(total, 2 * exact, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_map_and_its_gradients(monkeypatch: pytest.MonkeyPatch, has_bias: bool, frozen: int | None) -> None:
    monkeypatch.setattr(linear, "onednn_wins", lambda: True)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "_by_onednn", lambda *args: pytest.fail("this product is ours"))
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 100, 112), (352, 112), (352,)][: 3 if has_bias else 2]
    leaves = [
        torch.randn(shape, generator=generator).requires_grad_(index != frozen) for index, shape in enumerate(shapes)
    ]
    upstream = torch.randn(4, 100, 352, generator=generator)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    with threads(1):
        found = linear.linear(*leaves)
        found.backward(upstream)
    expected = linear.linear_reference(*exact)
    expected.backward(upstream.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for index, (leaf, right) in enumerate(zip(leaves, exact, strict=True)):
        assert (leaf.grad is None) == (index == frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


def test_where_there_is_no_library_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_ready", lambda device: "no compiler")
    assert not serves(*draw(500, 96, 64, (True, False)))
