"""The dropout kernels keep exactly the elements that the formula's own Philox keeps, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.ops import dropout_add as formulae
from megatron.ops.triton import dropout_add
from tests.ops.triton.agree import DTYPES, check, draw, scattered

SEEDS = (3, 0x1234_5678_9ABC_DEF0, 2**62 - 1)


def seed_of(number: int, device: torch.device) -> Tensor:
    return torch.tensor([number], device=device)


@pytest.mark.parametrize("number", SEEDS)
@pytest.mark.parametrize("width", [1, 6, 33, 70])
def test_the_mask_is_that_of_the_formula(number: int, width: int, device: torch.device) -> None:
    ones, zeros = torch.ones(9, width, device=device), torch.zeros(9, width, device=device)
    seed = seed_of(number, device)
    output = dropout_add.add_dropped(ones, None, zeros, 0.5, seed)
    assert torch.equal(output, 2.0 * formulae.kept(9, width, 0.5, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(dtype: torch.dtype, device: torch.device) -> None:
    hidden, residual, bias = draw(device, dtype, (2, 3, 37), (2, 3, 37), (37,))
    seed = seed_of(SEEDS[1], device)
    check(
        lambda x, r, b: dropout_add.add_dropped(x, b, r, 0.3, seed),
        lambda x, r, b: reference(x, b, r, 0.3, seed),
        [hidden, scattered(residual), bias],
    )
    check(
        lambda x, r: dropout_add.add_dropped(x, None, r, 0.3, seed),
        lambda x, r: reference(x, None, r, 0.3, seed),
        [scattered(hidden), residual],
    )


def reference(hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor) -> Tensor:
    keep = formulae.kept(hidden.shape[:-1].numel(), hidden.shape[-1], probability, seed).view(hidden.shape)
    return residual + (hidden if bias is None else hidden + bias) * keep / (1 - probability)


def test_more_rows_and_columns_than_one_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_add, "_tile", lambda quarter: (2, 16))
    seed = seed_of(SEEDS[1], device)
    check(
        lambda x, r, b: dropout_add.add_dropped(x, b, r, 0.3, seed),
        lambda x, r, b: reference(x, b, r, 0.3, seed),
        draw(device, torch.float32, (41, 70), (41, 70), (70,)),
    )


def test_recomputation_draws_the_same_mask_and_the_next_call_another(device: torch.device) -> None:
    hidden, residual = draw(device, torch.float32, (8, 64), (8, 64))
    ones = torch.ones_like(hidden).requires_grad_()
    torch.manual_seed(5)
    output = checkpoint(dropout_add.add_dropped, ones, None, torch.zeros_like(ones), 0.5, use_reentrant=False)
    (gradient,) = torch.autograd.grad(output.sum(), ones)
    assert torch.equal(gradient, output)
    again = dropout_add.add_dropped(hidden, None, residual, 0.5)
    assert not torch.equal(again, dropout_add.add_dropped(hidden, None, residual, 0.5))


def test_the_eager_function_takes_the_seed_too(device: torch.device) -> None:
    hidden, residual, bias = (each.detach() for each in draw(device, torch.float32, (4, 9), (4, 9), (9,)))
    seed = seed_of(11, device)
    expected = dropout_add.add_dropped(hidden, bias, residual, 0.25, seed)
    torch.testing.assert_close(formulae.add_dropped(hidden, bias, residual, 0.25, seed), expected)


def test_operators(device: torch.device) -> None:
    hidden, residual, bias = (each.detach() for each in draw(device, torch.float32, (4, 9), (4, 9), (9,)))
    seed = seed_of(11, device)
    torch.library.opcheck(torch.ops.deepy.dropout_forward.default, (hidden, bias, residual, 0.25, seed))
    for each in (bias, None):
        torch.library.opcheck(torch.ops.deepy.dropout_backward.default, (hidden, each, 0.25, seed))
