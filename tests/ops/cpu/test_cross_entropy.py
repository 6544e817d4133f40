"""Losses and gradients are those of the formula in fp64, in every dtype, at any size, and whatever the threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import cross_entropy
from megatron.ops import logits as shares
from megatron.ops.cpu import library
from megatron.ops.cpu.cross_entropy import block_losses, share_losses

DTYPES = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SIZES = [1, 3, 16, 63, 64, 65, 1031, 5000]

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def draw(rows: int, size: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size, generator=generator).mul_(spread).to(dtype)
    return logits, torch.randint(0, size, (rows,), generator=generator)


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    values = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(values, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    return losses.detach(), gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1024.0, None])
def test_losses_and_gradients(size: int, dtype: torch.dtype, scale: float | None) -> None:
    logits, labels = draw(5, size, dtype)
    losses, gradient = exact(logits, labels)
    found = logits.clone()
    torch.testing.assert_close(block_losses(found, labels, scale).double(), losses, rtol=3e-7, atol=3e-7)
    if scale is None:
        assert torch.equal(found, logits)
        return
    smallest = 2**-24 if dtype == torch.float16 else 3e-8
    torch.testing.assert_close(found.double(), gradient * scale, rtol=DTYPES[dtype], atol=smallest * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_of_a_vocabulary_add_up(dtype: torch.dtype) -> None:
    logits, labels = draw(7, 131, dtype)
    losses, gradient = exact(logits, labels)
    statistics = [shares.logits_statistics(part, labels, first) for part, first in parts(logits)]
    maximum = torch.stack([own for own, _, _ in statistics]).amax(dim=0)
    total = sum(own_total * (own - maximum).exp() for own, own_total, _ in statistics)
    target = sum(own for _, _, own in statistics)

    for (part, first), own in zip(parts(logits), statistics, strict=True):

        def meet(mine: Tensor, own: Tensor = own) -> Tensor:
            torch.testing.assert_close(mine, own, rtol=3e-6, atol=0)
            return torch.stack((maximum, total, target))

        found, kept = part.clone(), part.clone()
        for one, scale in ((found, 4.0), (kept, None)):
            losses_here = share_losses(one, labels, scale, first, meet)
            torch.testing.assert_close(losses_here.double(), losses, rtol=1e-6, atol=1e-6)
        expected = 4.0 * gradient[:, first : first + part.shape[1]]
        torch.testing.assert_close(found.double(), expected, rtol=DTYPES[dtype] + 1e-6, atol=2e-7)
        assert torch.equal(kept, part)


def parts(logits: Tensor) -> list[tuple[Tensor, int]]:
    return [(logits[:, :77], 0), (logits[:, 77:], 77)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_and_what_is_infinite(dtype: torch.dtype) -> None:
    logits, labels = draw(6, 75, dtype)
    logits[0, 3], logits[1, 74], logits[2, :], logits[3, 5], logits[4, labels[4]] = (
        float("nan"), float("inf"), -float("inf"), -float("inf"), -float("inf")
    )  # fmt: skip
    expected, found = logits.clone(), logits.clone()
    losses = cross_entropy.block_losses(expected, labels, 1.0)
    torch.testing.assert_close(block_losses(found, labels, 1.0), losses, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found, expected, rtol=2 * DTYPES[dtype], atol=2e-7, equal_nan=True)
    assert losses.isnan().tolist() == [True, True, True, False, False, False]
    assert losses[4] == float("inf")


def test_a_label_far_below_the_largest_logit_has_its_exact_loss() -> None:
    logits = torch.full((2, 50), -3000.0)
    logits[0, 7], logits[1, 7] = 2000.0, 17.0
    losses = block_losses(logits, torch.tensor([3, 7]), 1.0)
    assert losses.tolist() == [5000.0, 0.0]
    assert logits[0, 3] == -1.0
    assert logits[0, 7] == 1.0
    assert logits[1].abs().max() == 0.0


def test_logits_that_are_not_in_rows() -> None:
    for dtype in DTYPES:
        logits, labels = draw(9, 70, dtype)
        expected = logits.clone()
        losses = block_losses(expected, labels, 1.0)
        transposed = logits.t().contiguous().t()
        apart = torch.zeros(18, 100, dtype=dtype)[::2, 20:90]
        apart.copy_(logits)
        for one in (transposed, apart):
            assert torch.equal(block_losses(one, labels.repeat_interleave(2)[::2], 1.0), losses)
            assert torch.equal(one, expected)


def test_threads_change_nothing() -> None:
    logits, labels = draw(64, 2001, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = logits.clone()
            results.append((block_losses(found, labels, 1.0), found))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("label", [-1, 37])
def test_a_label_outside_of_the_vocabulary(label: int) -> None:
    logits, labels = draw(3, 37, torch.float32)
    labels[1], before = label, logits.clone()
    with pytest.raises(IndexError, match=f"label {label} is outside of the vocabulary of 37"):
        block_losses(logits, labels, 1.0)
    assert torch.equal(logits, before)


def test_what_is_compiled_or_in_fp64_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.ops.cpu.cross_entropy.kernel", None)
    logits, labels = draw(3, 37, torch.float32)
    losses, gradient = exact(logits, labels)
    compiled = torch.compile(lambda one: block_losses(one, labels, 1.0), backend="eager", fullgraph=True)
    for dtype, function in ((torch.float32, compiled), (torch.float64, lambda one: block_losses(one, labels, 1.0))):
        found = logits.to(dtype, copy=True)
        torch.testing.assert_close(function(found).double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6)
