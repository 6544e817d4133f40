"""RMS norm in blocks of rows equals the formula in fp64, gradients included, wherever the last block ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import norms, norms_cpu

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def exact(inputs: Tensor, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """The formula in fp64 with its gradients."""
    x, w = (each.detach().double().requires_grad_() for each in (inputs, weight))
    output = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w
    return [output, *torch.autograd.grad(output, [x, w], upstream.double())]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 24), (16, 24)])
def test_it_is_the_formula(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms_cpu, "BLOCK_SIZE", 96)  # four rows to a block and thread
    monkeypatch.setattr(norms_cpu, "SMALLEST", 1)
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator).to(dtype)
    inputs = wide[..., : shape[-1]].requires_grad_()  # not contiguous
    weight, upstream = (torch.randn(size, generator=generator).to(dtype) for size in (shape[-1:], shape))
    weight.requires_grad_()
    output = norms.rms_norm(inputs, weight, 1e-5)
    assert type(output.grad_fn).__name__ == "_RMSNormBackward"
    found = [output, *torch.autograd.grad(output, [inputs, weight], upstream)]
    for one, other in zip(found, exact(inputs, weight, upstream), strict=True):
        assert one.dtype == dtype
        difference = (one.double() - other).abs().max().item()
        assert difference <= TOLERANCES[dtype] * max(1.0, other.abs().max().item())


def test_where_pytorch_is_faster_or_knows_more_it_is_pytorch() -> None:
    large, gains = torch.ones(2**12, 2**6), torch.ones(2**6)
    assert norms_cpu.is_for(large, gains)
    assert not norms_cpu.is_for(large[:64], gains)
    assert not norms_cpu.is_for(large.double(), gains.double())
    assert not norms_cpu.is_for(large, torch.ones(2, 2**6))
    assert not norms_cpu.is_for(large.to("meta"), gains)
