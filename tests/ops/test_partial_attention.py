"""Attention by parts equals the formula over all keys, gradients included."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron.ops import partial_attention
from megatron.ops.attention import attention_reference
from megatron.ops.partial_attention import attend_part, attend_part_backward, merge_part

SHAPES = {"mha": (2, 4, 4, 24, 8), "gqa": (2, 4, 2, 24, 8), "mqa": (1, 3, 1, 10, 4), "gpu": (2, 8, 2, 1152, 64)}


def inputs(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return query, key, value and the output's gradient."""
    batch, heads, groups, length, dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    sizes = [(batch, heads, length, dim), *[(batch, groups, length, dim)] * 2, (batch, heads, length, dim)]
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def causal_bias(length: int, device: str = "cpu") -> Tensor:
    return torch.full((length, length), float("-inf"), device=device).triu(1)


def alibi_window_bias(heads: int, length: int, window: int, device: str = "cpu") -> Tensor:
    columns = torch.arange(length, device=device)
    distance = columns.unsqueeze(1) - columns
    seen = (distance >= 0) & (distance <= window)
    slopes = torch.linspace(0.1, 0.5, heads, device=device).view(-1, 1, 1)
    return (-slopes * distance).masked_fill(~seen, float("-inf"))


def by_parts(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float, bias: Tensor, cuts: list[int]):
    """Return the output and the gradients, computed over the keys [cuts[i], cuts[i+1]) one after another."""
    output = torch.zeros(query.shape, device=query.device)
    lse = torch.full(query.shape[:3], float("-inf"), device=query.device)
    parts = list(pairwise(cuts))
    for start, stop in parts:
        keys = (each[:, :, start:stop] for each in (key, value))
        merge_part(output, lse, *attend_part(query, *keys, scale, bias=bias[..., start:stop]))
    rounded = output.to(query.dtype)
    of_query = torch.zeros(query.shape, device=query.device)
    of_key, of_value = (torch.zeros(key.shape, device=query.device) for _ in range(2))
    for start, stop in parts:
        keys = (each[:, :, start:stop] for each in (key, value))
        found = attend_part_backward(gradient, query, *keys, rounded, lse, scale, bias=bias[..., start:stop])
        of_query += found.query
        of_key[:, :, start:stop] += found.key
        of_value[:, :, start:stop] += found.value
    return output, of_query, of_key, of_value


def expected(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float, bias: Tensor):
    leaves = [each.detach().float().requires_grad_() for each in (query, key, value)]
    output = attention_reference(*leaves, scale, causal=False, mask=bias)
    output.backward(gradient.float())
    return output.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("tile", [512, 7])
@pytest.mark.parametrize("kind", ["causal", "window", "alibi"])
@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa"])
def test_parts_make_the_whole(shape: str, kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_attention, "_TILE", tile)
    query, key, value, gradient = inputs(shape)
    heads, length = query.shape[1:3]
    biases = {
        "causal": causal_bias(length),
        "window": alibi_window_bias(1, length, 5),
        "alibi": alibi_window_bias(heads, length, length),
    }
    wanted = expected(query, key, value, gradient, 0.4, biases[kind])
    for cuts in ([0, length], [0, 3, length], [0, 4, 9, length]):
        found = by_parts(query, key, value, gradient, 0.4, biases[kind], cuts)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tile", [512, 7])
def test_causal_is_the_bias_below_the_diagonal(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_attention, "_TILE", tile)
    query, key, value, gradient = inputs("gqa")
    bias = causal_bias(query.shape[2])
    output, lse = attend_part(query, key, value, 0.3, causal=True)
    torch.testing.assert_close((output, lse), attend_part(query, key, value, 0.3, bias=bias), rtol=1e-6, atol=1e-6)
    found = attend_part_backward(gradient, query, key, value, output, lse, 0.3, causal=True)
    wanted = attend_part_backward(gradient, query, key, value, output, lse, 0.3, bias=bias)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_query_that_sees_nothing_adds_nothing() -> None:
    query, key, value, gradient = inputs("gqa")
    hidden = torch.full((query.shape[2], key.shape[2]), float("-inf"))
    output, lse = attend_part(query, key, value, 1.0, bias=hidden)
    assert (output == 0).all()
    assert torch.isneginf(lse).all()
    whole, total = attend_part(query, key, value, 1.0)
    merged = whole.clone(), total.clone()
    merge_part(*merged, output, lse)
    torch.testing.assert_close(merged, (whole, total), rtol=0, atol=0)
    for found in attend_part_backward(gradient, query, key, value, whole, total, 1.0, bias=hidden):
        assert (found == 0).all()
    merge_part(output, lse, torch.zeros_like(output), torch.full_like(lse, float("-inf")))
    assert (output == 0).all()
    assert torch.isneginf(lse).all()


def test_bf16_parts_are_summed_in_fp32() -> None:
    query, key, value, gradient = inputs("gqa", dtype=torch.bfloat16)
    bias = causal_bias(query.shape[2])
    wanted = expected(query, key, value, gradient, 0.4, bias)
    found = by_parts(query, key, value, gradient, 0.4, bias, [0, 5, 11, 24])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)  # fp32 until it is rounded once
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_the_flash_kernel_is_called_as_it_is_declared() -> None:
    query, key, value, gradient = inputs("gpu", "meta", torch.bfloat16)
    output, lse = attend_part(query, key[:, :, :600], value[:, :, :600], 0.125)
    assert (output.shape, output.dtype, lse.shape) == (query.shape, query.dtype, query.shape[:3])
    found = attend_part_backward(gradient, query, key[:, :, :600], value[:, :, :600], output, lse, 0.125)
    assert [each.shape for each in found] == [query.shape, key[:, :, :600].shape, value[:, :, :600].shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_flash_kernel_agrees_with_the_formula() -> None:
    query, key, value, gradient = inputs("gpu", "cuda", torch.bfloat16)
    half = query.shape[2] // 2
    bias = causal_bias(query.shape[2], "cuda")
    wanted = expected(query, key, value, gradient, 0.125, bias)
    output = torch.zeros(query.shape, device="cuda")
    lse = torch.full(query.shape[:3], float("-inf"), device="cuda")
    rows = [(slice(0, half), slice(0, half), True), (slice(half, None), slice(half, None), True)]
    rows.append((slice(half, None), slice(0, half), False))
    gradients = [torch.zeros(each.shape, device="cuda") for each in (query, key, value)]
    for i, j, causal in rows:
        found = attend_part(query[:, :, i], key[:, :, j], value[:, :, j], 0.125, causal)
        merge_part(output[:, :, i], lse[:, :, i], *found)
    out = output.to(query.dtype)
    for i, j, causal in rows:
        parts = query[:, :, i], key[:, :, j], value[:, :, j], out[:, :, i], lse[:, :, i]
        found = attend_part_backward(gradient[:, :, i], *parts, 0.125, causal)
        for total, place, piece in zip(gradients, (i, j, j), found, strict=True):
            total[:, :, place] += piece
    for ours, theirs in zip((output, *gradients), wanted, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
