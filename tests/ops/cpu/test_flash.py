"""Attention by the kernel equals the formula in fp64, whatever is seen, in every dtype, at any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops.attention import sight_reference
from megatron.ops.cpu import library
from megatron.ops.cpu.flash import LARGEST_HEAD, flash_attention, serves
from megatron.ops.sight import Sight
from tests.ops.sights import KINDS, compare, heads_of, sight_of

SERVED = [kind for kind in KINDS if kind != "bias"]

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
    return flash_attention(query, key, value, sight)


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize(
    ("kv_heads", "dtype"), [(4, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.float16)]
)
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (119, 140)])
def test_training(kind: str, kv_heads: int, dtype: torch.dtype, queries: int, keys: int) -> None:
    compare(attend, heads_of(kv_heads, queries, keys, dtype), sight_of(kind, queries, keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 17, 64, 80, 128, 256])
def test_heads_of_any_size(dim: int, dtype: torch.dtype) -> None:
    compare(attend, heads_of(2, 40, 40, dtype, dim=dim), sight_of("causal", 40, 40, scale=dim**-0.5))


def test_fp32_is_exact_to_rounding_over_several_blocks() -> None:
    tensors = heads_of(2, 250, 250, torch.float32, dim=64)
    compare(attend, tensors, sight_of("causal", 250, 250, scale=0.125), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", SERVED)
def test_bf16_costs_no_more_than_rounding_the_results_twice(kind: str) -> None:
    *heads, upstream = heads_of(2, 251, 263, torch.bfloat16, dim=63)
    sight = sight_of(kind, 251, 263, scale=0.125)
    found = results(flash_attention, heads, upstream, sight)
    exact = results(sight_reference, [each.double() for each in heads], upstream.double(), sight)
    for one, right in zip(found, exact, strict=True):
        error, rounding = (one.double() - right).abs(), (right.bfloat16().double() - right).abs()
        assert error.mean() <= 2 * rounding.mean()
        assert error.max() <= 2.5 * rounding.max()


def results(function: Callable[..., Tensor], heads: list[Tensor], upstream: Tensor, sight: Sight) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    leaves = [each.detach().clone().requires_grad_() for each in heads]
    output = function(*leaves, sight)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_see_nothing_give_and_get_nothing(dtype: torch.dtype) -> None:
    query, key, value, upstream = heads_of(4, 20, 20, dtype)
    sight = sight_of("causal", 20, 20)
    bounds = sight.bounds(20, 20, query.device)
    bounds.first[:, 5] = 20
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    output = flash_attention(*leaves, sight)
    gradients = torch.autograd.grad(output, leaves, upstream)
    assert not output[:, :, 5].any()
    assert not gradients[0][:, :, 5].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_what_no_query_of_a_group_sees_may_be_anything() -> None:
    query, key, value, _ = heads_of(4, 30, 30, torch.float32)
    clean = flash_attention(query, key, value, sight_of("causal", 30, 30))
    query, key, value = (each.clone() for each in (query, key, value))
    key[0, 1, 20], value[1, 2, 25] = float("nan"), float("inf")
    found = flash_attention(query, key, value, sight_of("causal", 30, 30))
    assert torch.equal(found[:, :, :20], clean[:, :, :20])
    assert found[0, 1, 20:].isnan().all()


def test_threads_change_no_bit() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [each.requires_grad_() for each in heads_of(2, 130, 130, torch.bfloat16)]
            output = flash_attention(*leaves[:3], sight_of("window", 130, 130))
            results.append([output, *torch.autograd.grad(output, leaves[:3], leaves[3].detach())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_served() -> None:
    query, key, value, _ = heads_of(2, 20, 20, torch.float32)
    assert serves(query, key, value, sight_of("causal", 20, 20))
    assert not serves(query, key, value, sight_of("bias", 20, 20))
    assert not serves(query[:, :, :1], key, value, sight_of("causal", 1, 20))
    assert not serves(query, key.bfloat16(), value.bfloat16(), sight_of("causal", 20, 20))
    assert not serves(*heads_of(2, 4, 4, torch.float32, dim=LARGEST_HEAD + 1)[:3], sight_of("causal", 4, 4))
