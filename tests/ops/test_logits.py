"""The halves of a split cross entropy give the whole one's losses and gradients, however the vocabulary is cut."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from megatron.ops.cross_entropy import block_losses
from megatron.ops.logits import logits_gradient_, logits_statistics, share_losses

ROWS, VOCABULARY = 6, 11
CUTS = [[11], [5, 6], [1, 9, 1]]


def draw(scale: float = 3.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(ROWS, VOCABULARY, generator=generator)).to(dtype)
    return logits, torch.tensor([0, 10, 5, 4, 1, 9])


def meet(parts: list[Tensor]) -> Tensor:
    """Return what ranks make of their statistics."""
    stacked = torch.stack(parts)
    maximum = stacked[:, 0].amax(0)
    total = (stacked[:, 1] * (stacked[:, 0] - maximum).exp()).sum(0)
    return torch.stack((maximum, total, stacked[:, 2].sum(0)))


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_the_halves(sizes: list[int], scale: float) -> None:
    logits, labels = draw(scale)
    whole = logits.clone()
    losses = block_losses(whole, labels, 2.0)
    shares = [share.contiguous() for share in logits.split(sizes, dim=1)]
    firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    parts = [logits_statistics(share, labels, first) for share, first in zip(shares, firsts, strict=True)]
    maximum, total, target = meet(parts)
    torch.testing.assert_close(total.log() + maximum - target, losses, rtol=1e-5, atol=1e-5)
    for share, first in zip(shares, firsts, strict=True):
        logits_gradient_(share, labels, first, maximum, total, 2.0)
    torch.testing.assert_close(torch.cat(shares, dim=1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_shares_that_meet(sizes: list[int], dtype: torch.dtype) -> None:
    """Ranks are threads here, each of which waits for the others where they meet."""
    logits, labels = draw(dtype=dtype)
    whole = logits.clone()
    losses = block_losses(whole, labels, 4.0)
    shares = [share.contiguous() for share in logits.split(sizes, dim=1)]
    barrier, parts, results = threading.Barrier(len(sizes)), [None] * len(sizes), [None] * len(sizes)

    def rank(number: int) -> None:
        def exchange(statistics: Tensor) -> Tensor:
            parts[number] = statistics
            barrier.wait(timeout=30)
            return meet(parts)

        results[number] = share_losses(shares[number], labels, 4.0, sum(sizes[:number]), exchange)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, losses, rtol=1e-5, atol=1e-5)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}
    torch.testing.assert_close(torch.cat(shares, dim=1), whole, **tolerance)
