"""The cross entropy kernels equal the formula in fp64, in one block and in several, whole and by shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import cross_entropy as plain
from megatron.ops import logits as plain_halves
from megatron.ops.triton import cross_entropy
from tests.ops.triton.poison import poisoned

ROWS, COLUMNS = 7, 37
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=[16, 64], ids=lambda size: f"blocks of {size}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", request.param)


def draw(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a buffer, the logits [r, v] within it, and labels; the first and the last column are labels."""
    generator = torch.Generator().manual_seed(0)
    buffer = (6 * torch.randn(ROWS + 2, COLUMNS + 11, generator=generator)).to(device, dtype)
    labels = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, COLUMNS - 1])
    return buffer, buffer[1:-1, 5 : 5 + COLUMNS], labels.to(device)


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [r] and their gradients [r, v] in fp64."""
    leaf = logits.detach().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    losses.sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_losses_and_gradients_in_place(dtype: torch.dtype, device: torch.device) -> None:
    buffer, logits, labels = draw(dtype, device)
    before = buffer.clone()
    losses, gradients = exact(logits, labels)
    scale = plain.FP16_SCALE if dtype == torch.float16 else 1.0
    with poisoned():
        result = cross_entropy.block_losses(logits, labels, scale)
    torch.testing.assert_close(result.double(), losses, rtol=1e-5, atol=1e-5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(logits.double() / scale, gradients, rtol=tolerance, atol=tolerance)
    logits.copy_(before[1:-1, 5 : 5 + COLUMNS])
    assert torch.equal(buffer, before), "something beside the logits was written"


@pytest.mark.usefixtures("block")
def test_losses_alone_leave_the_logits(device: torch.device) -> None:
    buffer, logits, labels = draw(torch.bfloat16, device)
    before = buffer.clone()
    with poisoned():
        result = cross_entropy.block_losses(logits, labels, None)
    torch.testing.assert_close(result.double(), exact(logits, labels)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(buffer, before)


def test_logits_of_any_strides(device: torch.device) -> None:
    _, logits, labels = draw(torch.float32, device)
    turned = logits.t().contiguous().t()
    losses, gradients = exact(logits, labels)
    torch.testing.assert_close(cross_entropy.block_losses(turned, labels, 1.0).double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.double(), gradients, rtol=1e-5, atol=1e-6)


def test_logits_so_large_that_their_exponentials_overflow(device: torch.device) -> None:
    """The maximum grows from block to block, and the label's own probability is 0 in fp32."""
    logits = torch.linspace(-1000, 1000, 6000, device=device).repeat(2, 1)
    labels = torch.tensor([0, 5999], device=device)
    losses, gradients = exact(logits, labels)
    result = cross_entropy.block_losses(logits, labels, 1.0)
    torch.testing.assert_close(result.double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_shares_of_the_vocabulary(dtype: torch.dtype, device: torch.device) -> None:
    """Two ranks' statistics add up to the whole rows', and each writes its own columns' gradient."""
    _, logits, labels = draw(dtype, device)
    losses, gradients = exact(logits, labels)
    firsts = [0, 20]
    shares = [logits[:, :20].contiguous(), logits[:, 20:].contiguous()]
    with poisoned():
        parts = [cross_entropy.logits_statistics(*each) for each in zip(shares, [labels] * 2, firsts, strict=True)]
    for share, first, part in zip(shares, firsts, parts, strict=True):
        expected = plain_halves.logits_statistics(share.double(), labels, first)
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)
    maximum = torch.maximum(parts[0][0], parts[1][0])
    total = sum(part[1] * (part[0] - maximum).exp() for part in parts)
    target = parts[0][2] + parts[1][2]
    torch.testing.assert_close((total.log() + maximum - target).double(), losses, rtol=1e-5, atol=1e-5)
    for share, first in zip(shares, firsts, strict=True):
        twin = share.double()
        plain_halves.logits_gradient_(twin, labels, first, maximum.double(), total.double(), 4.0)
        cross_entropy.logits_gradient_(share, labels, first, maximum, total, 4.0)
        torch.testing.assert_close(share.double(), twin, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
        mine = gradients[:, first : first + share.shape[1]]
        torch.testing.assert_close(share.double(), 4 * mine, rtol=4 * TOLERANCES[dtype], atol=4 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_chunked_loss_takes_the_kernel(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_chunk", lambda weight: 3)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(ROWS, 9, generator=generator), torch.randn(COLUMNS, 9, generator=generator)
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    labels, factors = draw(dtype, device)[2], torch.rand(ROWS, generator=generator).to(device)
    exact_leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    losses = torch.nn.functional.cross_entropy(exact_leaves[0] @ exact_leaves[1].t(), labels, reduction="none")
    expected = (losses * factors).sum()
    expected.backward()
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    total = plain.linear_cross_entropy_sum(*leaves, labels, factors, cross_entropy.block_losses)
    total.backward()
    tolerance = max(1e-5, 2 * TOLERANCES[dtype])
    torch.testing.assert_close(total.detach().double(), expected.detach(), rtol=tolerance, atol=0)
    for leaf, twin in zip(leaves, exact_leaves, strict=True):
        assert (leaf.grad.double() - twin.grad).norm() <= tolerance * twin.grad.norm()


def test_the_operators_are_registered_well(device: torch.device) -> None:
    _, logits, labels = draw(torch.float32, device)
    statistics = cross_entropy.logits_statistics(logits, labels, 3)
    torch.library.opcheck(cross_entropy.cross_entropy_losses_, (logits, labels, 1.0, True))
    torch.library.opcheck(cross_entropy.logits_statistics, (logits, labels, 3))
    arguments = (logits, labels, 3, statistics[0], statistics[1], 1.0)
    torch.library.opcheck(cross_entropy.logits_gradient_, arguments)
