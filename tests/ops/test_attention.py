"""Attention equals softmax(scale q k^T + mask) v, gradients included, for every shape of heads and masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import attention_cpu
from megatron.ops.attention import attention, attention_reference
from megatron.ops.attention_cpu import causal_attention

TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}


def draw(heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compare(tensors: list[Tensor], causal: bool, mask: Tensor | None) -> None:
    results = []
    for function in (attention, attention_reference):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        output = function(*leaves, 0.3, causal, mask)
        assert output.shape == tensors[0].shape
        assert output.dtype == tensors[0].dtype
        output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
        results.append([output, *[leaf.grad for leaf in leaves]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCES[tensors[0].dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("length", [1, 5, 33, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("longest_kept", [32, 512])
def test_causal(
    heads: int, kv_heads: int, length: int, dtype: torch.dtype, longest_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "LONGEST_KEPT", longest_kept)
    compare(draw(heads, kv_heads, length, length, dtype), causal=True, mask=None)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_training_on_a_cpu_equals_sdpa(dtype: torch.dtype) -> None:
    tensors = draw(4, 2, 300, 300, dtype)
    with torch.no_grad():
        expected = attention(*tensors, 0.3, True)
    torch.testing.assert_close(causal_attention(*tensors, 0.3), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_a_mask_of_what_is_seen(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    seen = torch.rand(2, 1, 5, 9) < 0.5
    seen[..., 0] = True
    compare(draw(heads, kv_heads, 5, 9, dtype), causal=False, mask=seen)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_bias_of_each_head(dtype: torch.dtype) -> None:
    bias = torch.randn(4, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    compare(draw(4, 2, 7, 7, dtype), causal=False, mask=bias)


def test_a_learned_bias_has_a_gradient() -> None:
    tensors = draw(4, 4, 6, 6, torch.float32)
    causal = torch.ones(6, 6).triu(1).bool()
    gradients = []
    for function in (attention, attention_reference):
        bias = torch.linspace(-1, 1, 4 * 36).view(4, 6, 6).requires_grad_()
        function(*tensors, 0.3, False, bias.masked_fill(causal, float("-inf"))).square().sum().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_one_query_sees_all_keys() -> None:
    compare(draw(4, 2, 1, 11, torch.float32), causal=False, mask=None)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    query, key, value = draw(4, 4, 6, 6, torch.float32)
    samples = torch.stack([attention(query, key, value, 0.3, True, dropout=0.3) for _ in range(600)])
    torch.testing.assert_close(samples.mean(0), attention(query, key, value, 0.3, True), rtol=0, atol=0.2)
    assert not torch.equal(samples[0], samples[1])
