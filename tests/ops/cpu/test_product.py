"""Products equal fp64's at any size, in any strides, whatever the threads, and serve what they can; in bf16 as well."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron.ops import cross_entropy, linear
from megatron.ops.cpu import library
from megatron.ops.cpu import product as module
from megatron.ops.cpu.library import has_bf16
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

HALF_SIZES = [
    (1, 1, 2),
    (12, 32, 10),
    (13, 33, 258),
    (700, 70, 300),
    (96, 512, 256),
    (97, 1601, 3100),  # several passes, in parts of a column of copies
    (1100, 40, 1540),  # and of a row of them
    (1030, 6200, 4),
]
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FP32, BF16]

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


@pytest.fixture
def bf16(ready: None) -> None:
    if not has_bf16():
        pytest.skip("this processor has no products of bf16 pairs")


def require(request: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    if dtype == BF16:
        request.getfixturevalue("bf16")


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def draw(
    rows: int, columns: int, depth: int, turned: tuple[bool, bool], dtype: torch.dtype = FP32
) -> tuple[Tensor, Tensor]:
    """Return A [n, k] and B [k, m], which are transposed views where `turned`, and neither of which lies closely."""
    generator = torch.Generator().manual_seed(depth + rows)

    def matrix(high: int, wide: int, is_turned: bool) -> Tensor:
        shape = (wide, high) if is_turned else (high, wide)
        beyond = 3 if dtype == FP32 else 2 + shape[1] % 2  # bf16 is served in words
        values = torch.randn(shape[0], shape[1] + beyond, generator=generator).to(dtype)[:, : shape[1]]
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


@pytest.mark.usefixtures("bf16")
class TestBf16:
    """Products of bf16, into bf16 or fp32."""

    @pytest.mark.parametrize("into", DTYPES)
    @pytest.mark.parametrize("turned", TURNED)
    @pytest.mark.parametrize("size", HALF_SIZES)
    def test_they_are_rounded_once(
        self, size: tuple[int, int, int], turned: tuple[bool, bool], into: torch.dtype
    ) -> None:
        left, right = draw(*size, turned, BF16)
        bias = torch.randn(size[1], generator=torch.Generator().manual_seed(1)).to(into)
        exact = left.double() @ right.double() + bias.double()
        room = torch.full((size[0] + 1, size[1] + 5), float("nan"), dtype=into)
        found = multiply(room[:-1, :-5], left, right, bias)
        terms = left.double().abs() @ right.double().abs() + bias.double().abs()
        summed = 2**-23 * (size[2] ** 0.5 + 4) * terms
        rounded = 2**-8 * exact.abs() if into == BF16 else 0.0
        assert (found.double() - exact).abs().le(summed + rounded).all()
        assert room[-1].isnan().all()
        assert room[:, -5:].isnan().all()

    @pytest.mark.parametrize("size", HALF_SIZES)
    def test_they_are_added_to_fp32(self, size: tuple[int, int, int]) -> None:
        left, right = draw(*size, (True, False), BF16)
        once = multiply(torch.empty(size[:2]), left, right)
        twice = multiply(once.clone(), left, right, adds=True)
        torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-4)

    def test_an_odd_number_of_rows_is_filled_up(self) -> None:
        left, right = draw(40, 50, 7, (True, False), BF16)
        exact = left.double() @ right.double()
        torch.testing.assert_close(multiply(torch.empty(40, 50), left, right).double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("size", HALF_SIZES)
    def test_the_sums_of_the_left_factors_rows(self, size: tuple[int, int, int]) -> None:
        left, right = draw(*size, (True, False), BF16)
        room = torch.full((size[0] + 1,), float("nan"))
        multiply(torch.empty(size[:2], dtype=BF16), left, right, sums=room[:-1])
        torch.testing.assert_close(room[:-1].double(), left.double().sum(1), rtol=1e-5, atol=1e-4)
        assert room[-1].isnan()

    def test_lines_may_begin_and_end_anywhere(self) -> None:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(100, 303, generator=generator).to(BF16)[:, 1:offset] for offset in (300, 300))
        with threads(1):
            assert serves(left.expand(5, 100, 299).reshape(500, 299), right.t())
        found = multiply(torch.empty(100, 100), left, right.t())
        torch.testing.assert_close(found.double(), left.double() @ right.double().t(), rtol=1e-5, atol=1e-4)

    def test_an_address_changes_no_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_products(monkeypatch)
        generator = torch.Generator().manual_seed(0)
        weight, inputs = (torch.randn(400, 128, generator=generator).to(BF16) for _ in range(2))
        elsewhere = torch.empty(400 * 128 + 1, dtype=BF16)[1:].view(400, 128).copy_(weight)
        with threads(1):
            assert torch.equal(linear.linear(inputs, weight), linear.linear(inputs, elsewhere))
        assert len(calls) == 2

    def test_what_is_below_every_normal_number_is_0_in_any_tile(self) -> None:
        left, right = torch.zeros(40, 64, dtype=BF16), torch.zeros(64, 50, dtype=BF16)
        bias = torch.full((50,), 1e-39, dtype=BF16)
        assert not multiply(torch.ones(40, 50, dtype=BF16), left, right, bias).any()

    def test_chunks_of_a_loss_are_summed_unrounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_products(monkeypatch)
        gradient, weighted = draw(400, 112, 160, (True, False), BF16)
        exact = gradient.double() @ weighted.double()
        totals = torch.full((400, 112), float("nan")), torch.full((112, 400), float("nan")).t()
        with threads(1):
            for total in totals:
                cross_entropy._accumulate(total, gradient.t(), weighted, is_first=True)
                cross_entropy._accumulate(total, gradient.t(), weighted, is_first=False)
        torch.testing.assert_close(totals[0].double(), 2 * exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(totals[1].double(), 2 * exact, rtol=2**-7, atol=1e-3)  # in blocks, each rounded
        assert len(calls) == 2

    def test_what_is_added_to_bf16_is_pytorchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_products(monkeypatch)
        left, right = draw(400, 112, 160, (True, False), BF16)
        total = torch.ones(400, 112, dtype=BF16)
        with threads(1):
            linear.accumulate_product(total, left, right, is_first=False)
            torch.testing.assert_close(total.double(), 1 + left.double() @ right.double(), rtol=2**-7, atol=1e-2)
            assert not calls
            linear.accumulate_product(total, left, right, is_first=True)
        torch.testing.assert_close(total.double(), left.double() @ right.double(), rtol=2**-8, atol=1e-4)
        assert len(calls) == 1

    @pytest.mark.parametrize("frozen", [None, 0, 1, 2])
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_a_linear_map_and_its_gradients(
        self, monkeypatch: pytest.MonkeyPatch, has_bias: bool, frozen: int | None
    ) -> None:
        calls = count_products(monkeypatch)
        exact, found = trained_maps(has_bias, frozen, BF16)
        for name, value in found.items():
            assert value.dtype == BF16
            # each is rounded once; PyTorch's, of the same numbers in fp64, is not
            torch.testing.assert_close(value.double(), exact[name], rtol=2**-8, atol=2e-5)
        assert len(calls) == 3 - (frozen in (0, 1))

    def test_it_is_pytorchs_where_the_processor_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_products(monkeypatch)
        monkeypatch.setattr(linear, "has_bf16", lambda: False)
        monkeypatch.setattr(module, "has_bf16", lambda: False)
        trained_maps(True, None, BF16)
        with threads(1):
            assert not serves(*draw(500, 96, 64, (True, False), BF16))
        assert not calls

    def test_autocast_is_pytorchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_products(monkeypatch)
        with torch.autocast("cpu", torch.float16):
            trained_maps(False, None, FP32, torch.float16)
            trained_maps(False, None, BF16, torch.float16)
        assert not calls

    @pytest.mark.skipif(sys.platform != "linux", reason="pages that cannot be read are made by Linux's calls")
    def test_nothing_beyond_a_factor_is_read(self) -> None:
        ended = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("turned", TURNED)
def test_threads_change_no_bit(
    request: pytest.FixtureRequest, turned: tuple[bool, bool], is_read: bool, dtype: torch.dtype
) -> None:
    require(request, dtype)
    deep = 1600 if dtype == BF16 else 800
    left, right = draw(500, 608, deep if is_read else 300, turned, dtype)
    found = []
    for number in (1, 2):
        with threads(number):
            sums, output = torch.empty(500) if turned[0] else None, torch.empty(500, 608, dtype=dtype)
            found.append((multiply(output, left, right, sums=sums, is_read=is_read), sums))
    assert torch.equal(found[0][0], found[1][0])
    assert sums is None or torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_needed_soon_is_the_same(request: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    require(request, dtype)
    left, right = draw(200, 96, 70, (True, False), dtype)
    room = torch.full((200, 128), float("nan"), dtype=dtype)
    found = multiply(room[:, :96], left, right, is_read=False)
    assert torch.equal(found, multiply(torch.empty(200, 96, dtype=dtype), left, right))
    assert room[:, 96:].isnan().all()
    uneven = torch.full((200, 97), float("nan"), dtype=dtype)  # rows that begin anywhere
    assert torch.equal(multiply(uneven[:, :96], left, right, is_read=False), found)
    assert uneven[:, 96].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", TURNED)
def test_a_row_depends_on_no_other(
    request: pytest.FixtureRequest, turned: tuple[bool, bool], dtype: torch.dtype
) -> None:
    require(request, dtype)
    left, right = draw(100, 100, 900 if dtype == FP32 else 1800, turned, dtype)
    whole = multiply(torch.empty(100, 100, dtype=dtype), left, right)
    for count in (1, 17, 56):
        assert torch.equal(multiply(torch.empty(count, 100, dtype=dtype), left[:count], right), whole[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", TURNED)
def test_values_that_are_no_numbers_stay_in_their_row(
    request: pytest.FixtureRequest, turned: tuple[bool, bool], dtype: torch.dtype
) -> None:
    require(request, dtype)
    left, right = draw(30, 40, 20, turned, dtype)
    left = left.clone(memory_format=torch.preserve_format)
    left[7, 3] = float("inf")
    found = multiply(torch.empty(30, 40, dtype=dtype), left, right)
    assert not found[7].isfinite().any()
    assert found[torch.arange(30) != 7].isfinite().all()


def test_what_is_served() -> None:
    left, right = draw(500, 96, 64, (True, False))
    with threads(1):
        assert serves(left, right)
        assert serves(left.contiguous(), right.t().contiguous().t())
        assert serves(left, right[:1].expand(64, 96))
        assert not serves(left.half(), right.half())
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
    calls = count_products(monkeypatch)
    exact, found = trained_maps(has_bias, frozen, FP32)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 - (frozen in (0, 1))


GUARDED = """
import ctypes, mmap, torch
from megatron.ops.cpu.library import make_ready
from megatron.ops.cpu.product import multiply

def at_the_end(*shape):
    size = 2 * shape[0] * shape[1]
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + readable), ctypes.c_size_t(mmap.PAGESIZE), 0)
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=size // 2, offset=readable - size).view(*shape).fill_(1)

assert not make_ready(torch.device("cpu"))
for rows, columns, depth in ((13, 33, 7), (13, 33, 63), (100, 70, 31), (12, 32, 16)):
    for left in (at_the_end(rows, depth), at_the_end(depth, rows).t()):
        for right in (at_the_end(depth, columns), at_the_end(columns, depth).t()):
            assert (multiply(torch.empty(rows, columns), left, right) == depth).all()
"""


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every product be ours; return a list that grows with each."""
    calls: list[int] = []
    monkeypatch.setattr(linear, "onednn_wins", lambda: True)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "multiply", lambda *args, **keys: calls.append(1) or multiply(*args, **keys))
    monkeypatch.setattr(linear, "_by_onednn", lambda *args: pytest.fail("this product is ours"))
    return calls


def trained_maps(
    has_bias: bool, frozen: int | None, dtype: torch.dtype, result: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return output and gradients of a linear map by name: PyTorch's in fp64, and ours from the same numbers.

    frozen: which of inputs, weight and bias needs no gradient. result: the dtype of our output, where not `dtype`.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 100, 112), (352, 112), (352,)][: 3 if has_bias else 2]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(4, 100, 352, generator=generator).to(dtype)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [leaf.to(dtype, copy=True).requires_grad_(index != frozen) for index, leaf in enumerate(drawn)]
        output = function(*leaves)
        if dtype != torch.float64:
            assert output.dtype == (result or dtype)
        output.backward(upstream.to(output.dtype))
        gradients = {f"gradient {index}": leaf.grad for index, leaf in enumerate(leaves) if leaf.grad is not None}
        assert len(gradients) == len(leaves) - (frozen is not None and frozen < len(leaves))
        return {"output": output.detach(), **gradients}

    with threads(1):
        return results(linear.linear_reference, torch.float64), results(linear.linear, dtype)


def test_where_there_is_no_library_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_ready", lambda device: "no compiler")
    assert not serves(*draw(500, 96, 64, (True, False)))
