"""The update in one pass is the formula's, bit for bit where it rounds at random, and whatever the threads."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron.ops import adamw
from megatron.ops.cpu import library
from megatron.ops.cpu.adamw import adamw_update_, sum_of_squares

SHAPES = [(1,), (7,), (16,), (3, 5, 11), (0,), (16384,), (129, 257), (2,)]
HALVES = (torch.bfloat16, torch.float16)
NUMBERS = (0.02, 0.9, 0.95, 1e-8, 0.1, 12345678901, 3)
"""Rate, betas, eps, weight decay, seed, and the number of the first tensor."""

pytestmark = pytest.mark.usefixtures("ready")
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def draw(gradient: torch.dtype, moment: torch.dtype, weight: torch.dtype | None) -> Lists:
    generator = torch.Generator().manual_seed(0)
    gradients, masters, averages, squares = (
        [torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)
    )
    return (
        [each.to(gradient) for each in gradients],
        masters,
        [each.mul(0.1).to(moment) for each in averages],
        [each.square().to(moment) for each in squares],
        [torch.zeros(shape, dtype=weight) for shape in SHAPES] if weight else [],
    )


def exact(lists: Lists, coefficient: float, step: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return masters, averages and squares after the formula in fp64."""
    rate, beta1, beta2, eps, decay = NUMBERS[:5]
    results: tuple[list[Tensor], ...] = [], [], []
    for gradient, master, average, square in zip(*(map(Tensor.double, each) for each in lists[:4]), strict=True):
        gradient = gradient * coefficient
        average = beta1 * average + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        change = average / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
        for result, value in zip(results, (master * (1 - rate * decay) - rate * change, average, square), strict=True):
            result.append(value)
    return results


CASES = [
    *product((torch.float32, torch.bfloat16, torch.float16), (torch.float32,), (None, *HALVES, torch.float32)),
    *product((torch.float32, torch.bfloat16), (torch.bfloat16,), (None, torch.bfloat16)),
]


@pytest.mark.parametrize(("gradient", "moment", "weight"), CASES)
def test_an_update(gradient: torch.dtype, moment: torch.dtype, weight: torch.dtype | None) -> None:
    lists = draw(gradient, moment, weight)
    gradients = [each.clone() for each in lists[0]]
    expected = exact(lists, 0.25, 3.0)
    adamw_update_(*lists, torch.tensor(0.25), torch.tensor(3.0), *NUMBERS)
    torch.testing.assert_close([each.double() for each in lists[1]], expected[0], rtol=1e-6, atol=2e-7)
    for found, values in zip(lists[2:4], expected[1:], strict=True):
        rtol = 2e-6 if moment == torch.float32 else 2**-7
        torch.testing.assert_close([each.double() for each in found], values, rtol=rtol, atol=1e-7)
    assert all(torch.equal(each, master.to(weight)) for each, master in zip(lists[4], lists[1], strict=False))
    assert all(torch.equal(*pair) for pair in zip(lists[0], gradients, strict=True)), "gradients stay"


def test_moments_are_rounded_by_the_bits_of_the_formula() -> None:
    """But for those that the last digit of an fp32 sum takes over the edge: of 50,000 elements at most a few."""
    found, expected = (draw(torch.float32, torch.bfloat16, None) for _ in range(2))
    for number in range(1, 4):
        arguments = torch.tensor(0.5), torch.tensor(float(number)), *NUMBERS
        adamw_update_(*found, *arguments)
        adamw.adamw_update_reference_(*expected, *arguments)
    for one, other in zip(found[2] + found[3], expected[2] + expected[3], strict=True):
        assert int((one != other).sum()) <= 20
    assert sum(int((one != other).sum()) for one, other in zip(found[2], expected[2], strict=True)) <= 20


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
def test_halves_are_converted_as_they_are_read(moment: torch.dtype) -> None:
    for dtype in HALVES:
        found, expected = draw(dtype, moment, dtype), draw(dtype, moment, dtype)
        expected = [each.float() for each in expected[0]], *expected[1:]
        for lists in (found, expected):
            adamw_update_(*lists, torch.tensor(0.25), torch.tensor(3.0), *NUMBERS)
        for ones, others in zip(found[1:], expected[1:], strict=True):
            assert all(torch.equal(*pair) for pair in zip(ones, others, strict=True))
        assert torch.equal(sum_of_squares(found[0]), sum_of_squares(expected[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
def test_a_coefficient_that_is_not_finite_changes_nothing(value: float, moment: torch.dtype) -> None:
    lists, before = draw(torch.float32, moment, torch.bfloat16), draw(torch.float32, moment, torch.bfloat16)
    adamw_update_(*lists, torch.tensor(value), torch.tensor(0.0), *NUMBERS)
    for ones, others in zip(lists, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ones, others, strict=True))


def test_threads_change_nothing() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            lists = draw(torch.bfloat16, torch.bfloat16, torch.bfloat16)
            adamw_update_(*lists, torch.tensor(0.25), torch.tensor(3.0), *NUMBERS)
            results.append([*lists[1], *lists[2], *lists[3], *lists[4], sum_of_squares(lists[0])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def disordered(tensors: list[Tensor]) -> list[Tensor]:
    return [each.clone().mT.contiguous().mT if each.dim() > 1 else each.clone() for each in tensors]


def test_what_is_not_in_order() -> None:
    """Gradients are put in order; where anything else is not, PyTorch updates it."""
    arguments = torch.tensor(0.25), torch.tensor(3.0), *NUMBERS
    found, expected = (draw(torch.float32, torch.float32, torch.bfloat16) for _ in range(2))
    gradients = disordered(found[0])
    assert not gradients[3].is_contiguous()
    assert sum_of_squares(gradients) == pytest.approx(float(sum_of_squares(found[0])), rel=1e-6)
    adamw_update_(gradients, *found[1:], *arguments)
    adamw_update_(*expected, *arguments)
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))
    lists = [disordered(each) for each in draw(torch.float32, torch.float32, None)[:4]]
    adamw_update_(*lists, [], *arguments)
    for one, other in zip(lists[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-7)


def test_rate_may_be_a_tensor_and_weights_only_of_one_kind() -> None:
    found, expected = draw(torch.float32, torch.float32, None), draw(torch.float32, torch.float32, None)
    for lists, rate in ((found, torch.tensor(0.5)), (expected, 0.5)):
        adamw_update_(*lists, torch.tensor(1.0), torch.tensor(3.0), rate, *NUMBERS[1:])
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_sum_of_squares(dtype: torch.dtype) -> None:
    tensors = draw(dtype, torch.float32, None)[0]
    expected = sum(float(each.double().square().sum()) for each in tensors)
    found = sum_of_squares(tensors)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=2e-7)
    assert float(adamw.sum_of_squares(tensors)) == pytest.approx(expected, rel=1e-5)
    for value in (float("nan"), float("inf")):
        tensors[-1][1] = value
        assert not sum_of_squares(tensors).isfinite()


def test_eager_takes_halves_too() -> None:
    for moment in (torch.float32, torch.bfloat16):
        found, expected = draw(torch.bfloat16, moment, None), draw(torch.bfloat16, moment, None)
        expected = [each.float() for each in expected[0]], *expected[1:]
        for lists in (found, expected):
            adamw.adamw_update_(*lists, torch.tensor(0.25), torch.tensor(3.0), *NUMBERS)
        for ones, others in zip(found[1:], expected[1:], strict=True):
            assert all(torch.equal(*pair) for pair in zip(ones, others, strict=True))
