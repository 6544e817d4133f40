"""The scan equals the closed form of its recurrence, a sum over all earlier tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.scan import selective_scan

BATCH, LENGTH, CHANNELS, STATES = 2, 7, 3, 4


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = (BATCH, LENGTH, CHANNELS)
    u, delta, z = (torch.randn(tokens, generator=generator, dtype=torch.float64) for _ in range(3))
    b, c = (torch.randn(BATCH, LENGTH, STATES, generator=generator, dtype=torch.float64) for _ in range(2))
    a = -torch.rand(CHANNELS, STATES, generator=generator, dtype=torch.float64)
    skip, bias = (torch.randn(CHANNELS, generator=generator, dtype=torch.float64) for _ in range(2))
    return [u, delta, a, b, c, skip, z, bias]


def closed(u, delta, a, b, c, skip, z, bias) -> Tensor:
    """y[t] = sum over r <= t of C[t] . exp(A sum of d[r + 1 .. t]) B[r] d[r] u[r], and the rest."""
    d = F.softplus(delta + bias)
    sums = d.cumsum(1)
    between = sums[:, :, None] - sums[:, None]  # [b, t, r, e]
    kernel = torch.exp(between[..., None] * a) * (c[:, :, None] * b[:, None])[:, :, :, None]
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril()[None, :, :, None]
    y = (kernel.sum(-1) * seen * (d * u)[:, None]).sum(2)
    return (y + skip * u) * z * torch.sigmoid(z)


def test_the_closed_form_and_its_gradients() -> None:
    ours, theirs = ([each.clone().requires_grad_() for each in draw()] for _ in range(2))
    result, expected = selective_scan(*ours), closed(*theirs)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_fp32(dtype: torch.dtype) -> None:
    """Only inputs and outputs are rounded."""
    u, delta, a, b, c, skip, z, bias = draw()
    rounded = [tensor.to(dtype) for tensor in (u, delta, b, c, z)]
    u, delta, b, c, z = rounded
    result = selective_scan(u, delta, a.float(), b, c, skip.float(), z, bias.float())
    wide = [tensor.double() for tensor in rounded]
    expected = closed(wide[0], wide[1], a, wide[2], wide[3], skip, wide[4], bias)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_without_the_optional_parts() -> None:
    u, delta, a, b, c, *_ = draw()
    zeros, ones = torch.zeros(CHANNELS, dtype=torch.float64), torch.full_like(u, 50.0)
    expected = closed(u, delta, a, b, c, zeros, ones, zeros) / 50.0
    torch.testing.assert_close(selective_scan(u, delta, a, b, c), expected)
