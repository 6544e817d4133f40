"""The grouped matrix products equal one product for each expert in fp64: ragged, empty and single groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.grouped_gemm import grouped_matmul as plain
from megatron.ops.triton import grouped_matmul as kernels
from tests.ops.triton.poison import poisoned

TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = {"ragged": [3, 17, 1, 16], "empty": [0, 5, 0, 0, 20, 0], "one": [21], "none": [0, 0]}
HIDDEN, WIDE = 19, 33


def draw(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs [t, h], weights [e, h, f], upstream [t, f], none of them contiguous, and offsets."""
    generator = torch.Generator().manual_seed(len(sizes))
    tokens, experts = sum(sizes), len(sizes)
    inputs = torch.randn(tokens, HIDDEN + 3, generator=generator)[:, :HIDDEN]
    weights = torch.randn(experts, WIDE, HIDDEN, generator=generator).transpose(1, 2) / HIDDEN**0.5
    upstream = torch.randn(WIDE, tokens, generator=generator).t()
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return inputs.to(device, dtype), weights.to(device, dtype), upstream.to(device, dtype), offsets.to(device)


@pytest.mark.parametrize(("sizes", "dtype"), [*((name, torch.float32) for name in SIZES), ("ragged", torch.bfloat16),
                                              ("empty", torch.float16)])  # fmt: skip
def test_products(sizes: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, weights, upstream, offsets = draw(SIZES[sizes], dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (inputs, weights)]
    expected = plain(*exact, offsets)
    expected.backward(upstream.double())
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs, weights)]
    with poisoned():
        result = kernels.grouped_matmul(*leaves, offsets)
        result.backward(upstream)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(result.double(), expected.detach(), rtol=tolerance, atol=2 * tolerance)
    for leaf, twin in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == dtype
        largest = max(1.0, float(twin.grad.abs().max())) if twin.grad.numel() else 1.0
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=tolerance, atol=2 * tolerance * largest)


def test_an_expert_without_tokens_has_a_gradient_of_zero(device: torch.device) -> None:
    inputs, weights, upstream, offsets = draw(SIZES["empty"], torch.float32, device)
    leaf = weights.detach().requires_grad_()
    with poisoned():
        kernels.grouped_matmul(inputs, leaf, offsets).backward(upstream)
    assert leaf.grad[0].eq(0).all()
    assert leaf.grad[1].ne(0).any()


def test_only_the_gradient_that_is_needed(device: torch.device) -> None:
    inputs, weights, upstream, offsets = draw([2, 3], torch.float32, device)
    frozen = weights.detach()
    leaf = inputs.detach().requires_grad_()
    kernels.grouped_matmul(leaf, frozen, offsets).backward(upstream)
    assert leaf.grad is not None
    assert frozen.grad is None


def test_the_operators_are_registered_well(device: torch.device) -> None:
    inputs, weights, upstream, offsets = draw([2, 3], torch.float32, device)
    torch.library.opcheck(kernels.grouped_matmul_rows, (inputs, weights, offsets))
    torch.library.opcheck(kernels.grouped_matmul_weights, (inputs, upstream, offsets))
