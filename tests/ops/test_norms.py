"""Each norm equals its formula, gradients included; bf16 within its 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops.norms import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference, scale_norm

TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def agree(one: Callable[..., Tensor], other: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype) -> None:
    results = []
    for function in (one, other):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = function(*leaves)
        assert output.dtype == dtype
        output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype))
        results.append([output, *[leaf.grad for leaf in leaves]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, *shape) * 3 + 1, 1 + torch.randn(shape), torch.randn(shape)]
    agree(
        lambda x, w, b: layer_norm(x, shape, w, b, 1e-3),
        lambda x, w, b: layer_norm_reference(x, shape, w, b, 1e-3),
        tensors,
        dtype,
    )
    agree(
        lambda x: layer_norm(x, shape, None, None, 1e-5),
        lambda x: layer_norm_reference(x, shape, None, None, 1e-5),
        tensors[:1],
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, *shape) * 3 + 1, 1 + torch.randn(shape)]
    agree(lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: rms_norm_reference(x, w, 1e-3), tensors, dtype)


def test_scale_norm_gives_every_vector_the_length_of_its_weight() -> None:
    inputs = torch.randn(3, 5)
    output = scale_norm(inputs, torch.tensor([2.5]), eps=1e-8)
    torch.testing.assert_close(output.norm(dim=-1), torch.full((3,), 2.5))
    torch.testing.assert_close(output / 2.5 * inputs.norm(dim=-1, keepdim=True), inputs)
    assert torch.equal(scale_norm(torch.zeros(1, 4), torch.ones(1), eps=1e-8), torch.zeros(1, 4))


def test_statistics_of_bf16_are_fp32() -> None:
    """A sum of 4096 equal bf16 numbers stops growing at 256 times the number if it is itself bf16."""
    inputs = torch.ones(1, 4096, dtype=torch.bfloat16)
    for output in (
        rms_norm(inputs, torch.ones(4096, dtype=torch.bfloat16), 1e-8),
        scale_norm(inputs, torch.full((1,), 64.0, dtype=torch.bfloat16), 1e-8),
    ):
        torch.testing.assert_close(output, inputs, rtol=1e-2, atol=0)
