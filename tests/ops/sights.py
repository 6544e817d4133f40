"""Cases of attention that every back end meets: what is seen, and shapes of training, evaluation and decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.attention import sight_reference
from megatron.ops.attention_backend import Attend
from megatron.ops.sight import Sight

TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}
KINDS = (
    "causal",
    "window",
    "documents",
    "alibi",
    "padding",
    "bias",
    "documents window alibi",
    "full",
    "full documents",
)
HEADS = 4


def sight_of(kind: str, queries: int, keys: int, device: torch.device | str = "cpu", scale: float = 0.3) -> Sight:
    """Return what is seen in two rows of `keys` tokens."""
    columns = torch.arange(keys, device=device)
    segments = torch.stack([columns // max(1, keys // 3), (columns > keys // 2).long()])
    table = torch.linspace(-1, 1, HEADS * queries * keys, device=device).view(HEADS, queries, keys)
    return Sight(
        scale,
        window=max(1, keys // 5) if "window" in kind else None,
        slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device) if "alibi" in kind else None,
        segments=segments if "documents" in kind else None,
        padding=torch.tensor([0, keys // 3], device=device) if kind == "padding" else None,
        bias=table if kind == "bias" else None,
        causal="full" not in kind,
    )


def heads_of(
    kv_heads: int, queries: int, keys: int, dtype: torch.dtype, device: torch.device | str = "cpu", dim: int = 8,
    gap: int = 3,
) -> list[Tensor]:  # fmt: skip
    """Return query, key, value, and an upstream gradient, [b, n, s, d] that lie as [b, s, n, d + gap]."""
    generator = torch.Generator().manual_seed(queries + dim)
    shapes = [(2, queries, HEADS, dim), *[(2, keys, kv_heads, dim)] * 2, (2, queries, HEADS, dim)]
    wide = [torch.randn(*shape[:3], dim + gap, generator=generator) for shape in shapes]
    return [each.to(device, dtype)[..., :dim].transpose(1, 2) for each in wide]


def compare(attend: Attend, tensors: list[Tensor], sight: Sight, trains: bool = True, **tolerance: float) -> None:
    """Compare attention with the formula in fp64, and the gradients of query, key, value and bias where it trains."""
    *heads, upstream = tensors
    leaves = [each.detach().requires_grad_(trains) for each in heads]
    exact = [each.detach().double().requires_grad_(trains) for each in heads]
    output, wanted = attend(*leaves, sight), sight_reference(*exact, sight)
    assert output.shape == heads[0].shape
    assert output.dtype == heads[0].dtype
    tolerance = tolerance or TOLERANCES[heads[0].dtype]
    torch.testing.assert_close(output.double(), wanted, **tolerance)
    if trains:
        found = torch.autograd.grad(output, leaves, upstream)
        for one, other in zip(found, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one.double() / scale, other / scale, **tolerance)
