"""Each row is multiplied by the matrix of its own expert, gradients included."""

from __future__ import annotations

import torch

from megatron.ops.grouped_gemm import grouped_matmul


def test_rows_meet_their_own_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [2, 0, 3, 1]
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    expected = torch.einsum("th,thf->tf", inputs, weights[experts])
    result = grouped_matmul(inputs, weights, torch.tensor([0, *sizes]).cumsum(0))
    torch.testing.assert_close(result, expected)
    upstream = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(result, [inputs, weights], upstream)
    exact = torch.autograd.grad(expected, [inputs, weights], upstream)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)
    assert found[1][1].eq(0).all()
