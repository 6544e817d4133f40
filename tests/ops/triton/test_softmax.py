"""The softmax kernels equal the formula in fp64, for every kind of mask, in one block and in several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.softmax import masked_softmax as plain
from megatron.ops.triton import softmax
from tests.ops.triton.poison import poisoned

TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
MASKS = ["none", "causal", "window", "padding", "causal padding", "full"]
BATCH, HEADS = 2, 2


def draw(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scores and upstream [b, n, q, k], neither of them contiguous."""
    generator = torch.Generator().manual_seed(queries + keys)
    scores, upstream = (torch.randn(BATCH, queries, HEADS, keys + 3, generator=generator) for _ in range(2))
    return tuple(tensor.to(device, dtype)[..., :keys].transpose(1, 2) for tensor in (4 * scores, upstream))


def arguments(kind: str, queries: int, keys: int, device: torch.device) -> tuple[bool, int | None, Tensor | None]:
    """Return causal, window and mask; the mask hides every key from the first row of the batch."""
    causal = kind in ("causal", "window", "causal padding")
    lengths = torch.tensor([0, keys - 2], device=device)
    mask = None
    if "padding" in kind:
        mask = (torch.arange(keys, device=device) < lengths[:, None])[:, None, None, :]
    if kind == "full":
        mask = torch.rand(BATCH, HEADS, queries, keys, generator=torch.Generator().manual_seed(3)).to(device) < 0.5
    return causal, 4 if kind == "window" else None, mask


def check(kind: str, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> None:
    scores, upstream = draw(queries, keys, dtype, device)
    causal, window, mask = arguments(kind, queries, keys, device)
    leaf, exact = scores.detach().requires_grad_(), scores.detach().double().requires_grad_()
    expected = plain(exact, 0.3, causal, window, mask)
    expected.backward(upstream.double())
    with poisoned():
        result = softmax.masked_softmax(leaf, 0.3, causal, window, mask)
        result.backward(upstream)
    assert result.dtype == dtype
    assert torch.equal(result == 0, expected == 0) or dtype == torch.float16
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(result.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=4 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str, device: torch.device) -> None:
    check(kind, 5, 9, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype, device: torch.device) -> None:
    check("causal padding", 3, 37, dtype, device)


@pytest.mark.parametrize("kind", MASKS)
def test_rows_of_several_blocks(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "LARGEST_BLOCK", 16)
    check(kind, 5, 37, torch.float32, device)


@pytest.mark.parametrize("keys", [1, 16, 17])
def test_one_query_of_decoding(keys: int, device: torch.device) -> None:
    check("causal", 1, keys, torch.float32, device)


def test_queries_before_the_first_key_see_nothing(device: torch.device) -> None:
    scores = torch.ones(1, 1, 3, 2, device=device)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], device=device)
    torch.testing.assert_close(softmax.masked_softmax(scores, 1.0, causal=True)[0, 0], expected)
    torch.testing.assert_close(plain(scores, 1.0, causal=True)[0, 0], expected)


def test_what_is_not_seen_may_be_anything(device: torch.device) -> None:
    """NaN and infinity beyond the diagonal change neither probabilities nor gradients."""
    scores, upstream = draw(6, 6, torch.float32, device)
    hidden = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        leaf = scores.masked_fill(hidden, poison).requires_grad_()
        result = softmax.masked_softmax(leaf, 1.0, causal=True)
        result.backward(upstream.masked_fill(hidden, poison))
        results.append((result.detach(), leaf.grad))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_the_operators_are_registered_well(device: torch.device) -> None:
    scores, upstream = draw(2, 5, torch.float32, device)
    mask = arguments("padding", 2, 5, device)[2]
    torch.library.opcheck(softmax.masked_softmax_forward, (scores, mask, 0.5, True, 3))
    torch.library.opcheck(softmax.masked_softmax_backward, (scores.contiguous(), upstream, 0.5, True, 3))
