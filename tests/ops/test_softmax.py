"""The masked softmax equals PyTorch's, whose masks are made another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.ops import softmax_cpu
from megatron.ops.softmax import masked_softmax, masked_softmax_reference, seen_keys

SHAPE = (2, 3, 5, 9)


def scores(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causal_rows_see_the_last_keys_up_to_their_own(window: int | None) -> None:
    values = scores()
    result = masked_softmax(values, 0.5, causal=True, window=window)
    for query in range(5):
        stop = 9 - 5 + query + 1
        first = max(0, stop - (window or stop))
        expected = F.softmax(0.5 * values[:, :, query, first:stop], dim=-1)
        torch.testing.assert_close(result[:, :, query, first:stop], expected, rtol=1e-6, atol=1e-7)
        assert result[:, :, query, :first].eq(0).all()
        assert result[:, :, query, stop:].eq(0).all()


def test_a_padding_mask_hides_keys_of_a_sequence_and_all_keys_give_zeros() -> None:
    values = scores().requires_grad_()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0] = False
    mask[1, ..., 4:] = False
    result = masked_softmax(values, 1.0, mask=mask)
    assert result[0].eq(0).all()
    torch.testing.assert_close(result[1, ..., :4], F.softmax(values[1, ..., :4], dim=-1), rtol=1e-6, atol=1e-7)
    result[1].square().sum().backward()
    assert values.grad.isfinite().all()


def test_it_is_fp32_inside_and_keeps_the_dtype() -> None:
    values = 30 * scores(torch.bfloat16)
    result = masked_softmax(values, 1.0)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, F.softmax(values.float(), dim=-1).bfloat16())


def test_a_window_needs_causal_attention() -> None:
    with pytest.raises(AssertionError, match="a window is one of causal attention"):
        masked_softmax(scores(), 1.0, causal=False, window=3)


def test_seen_keys() -> None:
    seen = seen_keys(2, 4, 2, torch.device("cpu"))
    assert seen.tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window"), [(7, 9, True, None), (9, 9, True, 3), (5, 2, True, 1), (4, 6, False, None)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_heads_equal_the_formula(monkeypatch, dtype, queries, keys, causal, window, masked) -> None:
    monkeypatch.setattr(softmax_cpu, "BLOCK_SIZE", 2 * queries * keys)  # two heads of three, then one
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(2, queries, 3, keys, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    mask = (torch.rand(2, 1, 1, keys, generator=generator) < 0.6) if masked else None
    upstream = torch.randn(leaf.shape, generator=generator).to(dtype)
    found, exact = (
        function(x, 0.3, causal, window, mask)
        for function, x in ((masked_softmax, leaf), (masked_softmax_reference, leaf.double()))
    )
    (gradient,), (wanted,) = (torch.autograd.grad(y, leaf, upstream.to(y.dtype)) for y in (found, exact))
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, exact.to(dtype), **tolerance)
    torch.testing.assert_close(gradient, wanted.to(dtype), **tolerance)
