"""The float8 kernels leave the very bits that PyTorch's operations leave; on a GPU the products run in float8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import fp8 as formulae
from megatron.ops.triton import fp8 as kernels
from tests.ops.triton.interpreted import HAS_GPU
from tests.ops.triton.poison import poisoned

SHAPES = [(1, 16), (37, 48), (130, 272), (16, 1)]


def draw(device: torch.device, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return values over 12 orders of magnitude, some of which round to subnormal numbers and to zero."""
    generator = torch.Generator().manual_seed(shape[0])
    size = torch.exp(6 * torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * size).to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_gradient", [False, True])
def test_every_bit_is_that_of_the_formula(
    shape: tuple[int, int], dtype: torch.dtype, is_gradient: bool, device: torch.device
) -> None:
    values = draw(device, shape, dtype)
    largest = kernels.float8_measure(values)
    assert torch.equal(largest.amax(), formulae.measure(values)[0])
    expected = formulae.cast(values, largest, is_gradient, True, True)
    found = kernels.float8_cast(values, largest, is_gradient, True, True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.float(), other.float())


def test_nothing_is_left_out_and_nothing_else_is_written(device: torch.device) -> None:
    values = draw(device, (37, 48), torch.float32)
    with poisoned():
        largest = kernels.float8_measure(values)
        found = kernels.float8_cast(values, largest, True, True, True)
    assert all(torch.isfinite(each.float()).all() for each in (largest, *found))


def test_more_values_than_programs_read_at_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)
    values = draw(device, (67, 33)).contiguous()
    for place in (0, 64 * 3 * 4 + 5, values.numel() - 1):
        values.view(-1)[place] = -4e9 * (1 + place)
        assert kernels.float8_measure(values).max() == values.float().abs().max()


@pytest.mark.parametrize(("plain", "turned"), [(True, False), (False, True)])
def test_what_is_not_asked_for_is_empty(plain: bool, turned: bool, device: torch.device) -> None:
    values = draw(device, (37, 48))
    both = kernels.float8_cast(values, kernels.float8_measure(values), False, True, True)
    found = kernels.float8_cast(values, kernels.float8_measure(values), False, plain, turned)
    for one, other, asked in zip(found[:2], both[:2], (plain, turned), strict=True):
        assert torch.equal(one.float(), other.float()) if asked else one.numel() == 0
    assert torch.equal(found[2], both[2])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_every_product(wrong: float, device: torch.device) -> None:
    values = draw(device, (37, 48))
    values[36, 47] = wrong
    _, _, inverse = kernels.float8_cast(values, kernels.float8_measure(values), False, True, True)
    assert not torch.isfinite(inverse)


def test_zeros(device: torch.device) -> None:
    values = torch.zeros(5, 32, device=device, dtype=torch.bfloat16)
    small, turned, inverse = kernels.float8_cast(values, kernels.float8_measure(values), True, True, True)
    assert small.float().count_nonzero() == turned.float().count_nonzero() == 0
    assert torch.isfinite(inverse)


@pytest.mark.parametrize("rows", [32, 37])
def test_the_linear_map(rows: int, device: torch.device) -> None:
    """Forward and backward equal PyTorch's own, bit by bit, for the products are the same ones; and the formula."""
    if HAS_GPU and formulae.obstacle(device):
        pytest.skip(formulae.obstacle(device))
    generator = torch.Generator().manual_seed(2)
    shapes = [(rows, 48), (80, 48), (80,)]
    leaves = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    upstream = torch.randn(rows, 80, generator=generator).to(device, torch.bfloat16)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    results = []
    for function, values in (
        (kernels.float8_linear, leaves), (formulae.float8_linear, leaves), (formulae.float8_linear_reference, exact),
    ):  # fmt: skip
        output = function(*values)
        results.append([output, *torch.autograd.grad(output, values, upstream.to(output.dtype))])
    for one, other, right in zip(*results, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.float(), right, rtol=2**-6, atol=2**-7 * float(right.abs().max()))


def test_operators(device: torch.device) -> None:
    values = draw(device, (37, 48))
    torch.library.opcheck(torch.ops.deepy.float8_measure.default, (values,))
    largest = kernels.float8_measure(values)
    torch.library.opcheck(torch.ops.deepy.float8_cast.default, (values, largest, False, True, True))
