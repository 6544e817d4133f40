"""Flash attention of ours (Dao et al. 2022, 2023): softmax(scale q k^T + bias) v without the matrix of scores.

What is not seen is not computed: blocks beyond a window, of another document or of padding cost nothing, and blocks
that are seen whole take no masks. Heads are of any size up to 256 and any strides, several query heads may share a key;
sums are fp32. The backward pass recomputes the scores twice, once for the queries and once for the keys, so that each
sum has one program and one order: it uses no atomics, and its results are the same in every run. The kernels are in
`attention_kernels.py` and `attention_gradients.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops.attention_backend import Backend, without
from megatron.ops.partial_attention import Gradients
from megatron.ops.sight import Bounds, Sight
from megatron.ops.triton import attention_gradients as gradients
from megatron.ops.triton import attention_kernels as kernels
from megatron.ops.triton.launch import INTERPRETED, Sample, architecture, operator, runs, start

LARGEST_HEAD = 256
FAR = 2**30
"""A window that hides nothing."""

FEWEST_QUERIES = 16
"""A block of queries is no smaller."""

Tile = tuple[int, int, int, int]
"""Queries and keys of a block, warps and pipeline stages."""


def _parts(dim: int) -> tuple[int, int]:
    """Return the two powers of two, at least 16, that hold the features of a head; 0 for the second where one does."""
    whole = max(16, triton.next_power_of_2(dim))
    front = whole // 2
    back = max(16, triton.next_power_of_2(max(dim - front, 1)))
    return (front, back) if back < front and whole <= 128 else (whole, 0)


# For heads of up to so many features: tiles of the forward pass, of dq, and of dk and dv. They are large, but keep all
# values in registers, even with documents and alibi (docs/kernels.md has some); fp32 spills beyond 128 features.
_HOPPER: dict[int, tuple[Tile, Tile, Tile]] = {
    64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    96: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    128: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    256: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
}
_AMPERE: dict[int, tuple[Tile, Tile, Tile]] = {
    64: ((128, 64, 4, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    96: ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    128: ((128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    256: ((64, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
}
_FP32: dict[int, tuple[Tile, Tile, Tile]] = {
    64: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_SMALL: dict[int, tuple[Tile, Tile, Tile]] = {
    **_AMPERE,
    256: ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
}
"""GPUs of 99 KiB of shared memory for a program."""


def _tile(pass_number: int, dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """Return the tile of a pass: 0 forward, 1 dq, 2 dk and dv. arch: 80 for sm_80."""
    if INTERPRETED:
        return (16, 16, 4, 1)
    large = _HOPPER if arch in (90, 100, 103) else _AMPERE if arch == 80 else _SMALL
    table = _FP32 if dtype == torch.float32 else large
    return table[min(most for most in table if dim <= most)][pass_number]


def _constants(tile: Tile, query: Tensor, kind: int, slopes: Tensor | None) -> dict[str, Any]:
    queries, keys, warps, stages = tile
    front, back = _parts(query.shape[3])
    return {
        "DIM": query.shape[3],
        "FRONT": front,
        "BACK": back,
        "QUERIES": queries,
        "KEYS": keys,
        "KIND": kind,
        "HAS_SLOPES": slopes is not None,
        "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
        "PRECISION": "ieee" if INTERPRETED else "tf32x3",
        "num_warps": warps,
        "num_stages": stages,
    }


def _kind(causal: bool, window: int, bounded: bool) -> int:
    if bounded:
        return kernels.BOUNDED
    return kernels.FULL if not causal else kernels.CAUSAL if window == FAR else kernels.WINDOW


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose features lie side by side; copied only where they do not."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _new(like: Tensor, length: int) -> Tensor:
    """Return an empty [b, n, length, d] that lies as [b, length, n, d], as products with weights want it."""
    batch, heads, _, dim = like.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _row_stride(bound: Tensor | None) -> int:
    return 0 if bound is None or len(bound) == 1 else bound.shape[1]


@operator()
def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, last: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output [b, n, q, d] and its log-sum-exp [b, n, q] fp32, -inf for a query that sees nothing.

    first, last: [b or 1, q] int32, contiguous, the keys that queries see, and then neither causal nor window counts.
    slopes: [n] fp32. window: FAR is none.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    output, log_sums = _new(query, num_queries), query.new_empty(query.shape[:3], dtype=torch.float32)
    if runs(query) and query.numel():
        query, key, value = _rows(query), _rows(key), _rows(value)
        tile = _tile(0, query.shape[3], query.dtype, architecture(query.device))
        start(
            kernels.forward,
            (triton.cdiv(num_queries, tile[0]), query.shape[1], query.shape[0]),
            *(query, key, value, output, log_sums),
            *(log_sums if each is None else each for each in (first, last, slopes)),
            *(scale, num_queries, num_keys, num_keys - num_queries, window),
            *(query.shape[1] // key.shape[1], _row_stride(first)),
            *(stride for each in (query, key, value, output) for stride in each.stride()[:3]),
            **_constants(tile, query, _kind(causal, window, first is not None), slopes),
        )
    return output, log_sums


@operator()
def attention_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sums: Tensor,
    first: Tensor | None, last: Tensor | None, begin: Tensor | None, end: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, [b, n, s, d] that lie as [b, s, n, d].

    begin, end: [b or 1, s] int32, contiguous, the queries that see each key. The rest is as it was given to
    `attention_forward` or came from there; of a part of the keys, output and log_sums are those of the whole.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    of_query, of_key, of_value = _new(query, num_queries), _new(key, num_keys), _new(key, num_keys)
    if not runs(query) or not query.numel() or not key.numel():
        return of_query.zero_() if runs(query) else of_query, of_key, of_value
    upstream, query, key, value, output = (_rows(each) for each in (upstream, query, key, value, output))
    deltas = query.new_empty(query.shape[:3], dtype=torch.float32)
    log_sums, arch = log_sums.contiguous(), architecture(query.device)
    heads, groups, kind = query.shape[1], key.shape[1], _kind(causal, window, first is not None)
    numbers = (scale, num_queries, num_keys, num_keys - num_queries, window, heads // groups)
    tile = _tile(1, query.shape[3], query.dtype, arch)
    start(
        gradients.query_gradient,
        (triton.cdiv(num_queries, tile[0]), heads, query.shape[0]),
        *(query, key, value, output, upstream, log_sums, deltas, of_query),
        *(log_sums if each is None else each for each in (first, last, slopes)),
        *(*numbers, _row_stride(first)),
        *(stride for each in (query, key, value, output, upstream, of_query) for stride in each.stride()[:3]),
        **_constants(tile, query, kind, slopes),
    )
    tile = _tile(2, query.shape[3], query.dtype, arch)
    start(
        gradients.key_gradient,
        (triton.cdiv(num_keys, tile[1]), groups, query.shape[0]),
        *(query, key, value, upstream, log_sums, deltas, of_key, of_value),
        *(log_sums if each is None else each for each in (begin, end, slopes)),
        *(*numbers, _row_stride(begin)),
        *(stride for each in (query, key, value, upstream, of_key) for stride in each.stride()[:3]),
        **_constants(tile, query, kind, slopes),
    )
    return of_query, of_key, of_value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Bounds | None, slopes: Tensor | None,
        scale: float, causal: bool, window: int,
    ) -> Tensor:  # fmt: skip
        first, last, begin, end = bounds or (None, None, None, None)
        output, log_sums = attention_forward(query, key, value, first, last, slopes, scale, causal, window)
        ctx.save_for_backward(query, key, value, output, log_sums, first, last, begin, end, slopes)
        ctx.settings = (scale, causal, window)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = attention_backward(upstream[0], *ctx.saved_tensors, *ctx.settings)
        return *found, None, None, None, None, None


def attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """Return [b, n, q, d] of query [b, n, q, d], key and value [b, k, s, d], without dropout or a bias."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    bounds = sight.bounds(num_queries, num_keys, query.device) if sight.rowwise else None
    window = FAR if sight.window is None or not sight.is_windowed(num_keys) else sight.window
    slopes = None if sight.slopes is None else sight.slopes.to(query.device, torch.float32)
    result: Tensor = _Attention.apply(query, key, value, bounds, slopes, sight.scale, sight.causal, window)
    return result


def _lacks(query: Tensor, key: Tensor, sight: Sight, dropout: float) -> str:
    if query.shape[3] > LARGEST_HEAD:
        return f"takes heads of up to {LARGEST_HEAD} features, and not {query.shape[3]}"
    if query.shape[2] < FEWEST_QUERIES <= key.shape[2] and not query.requires_grad:
        return f"is no match for fewer than {FEWEST_QUERIES} queries, whose keys it does not split over programs"
    return without(sight, key.shape[2], dropout, {"window", "segments", "padding", "slopes"})


class _Parts:
    """Its kernels for a part of the keys: `megatron.ops.partial_attention.PartKernel`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bounds: Bounds | None
    ) -> tuple[Tensor, Tensor]:
        first, last = (None, None) if bounds is None else bounds[:2]
        found: tuple[Tensor, Tensor] = attention_forward(query, key, value, first, last, None, scale, causal, FAR)
        return found

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float,
        causal: bool, bounds: Bounds | None,
    ) -> Gradients:  # fmt: skip
        inputs = (gradient, query, key, value, output, lse, *(bounds or (None, None, None, None)))
        return Gradients(*attention_backward(*inputs, None, scale, causal, FAR))


BACKEND = Backend(
    "triton", lambda query, key, value, sight, dropout: attention(query, key, value, sight), _lacks, _Parts()
)


def samples() -> list[Sample]:
    """Heads of 64 to 256 features: causal, windowed, grouped over documents, and with alibi."""
    segments, slopes = torch.empty(4, 2048, device="meta"), torch.empty(16, device="meta")
    shapes: dict[str, tuple[int, int, int, torch.dtype, Sight]] = {
        "64 causal": (16, 16, 64, torch.bfloat16, Sight(0.125)),
        "80 window": (32, 32, 80, torch.bfloat16, Sight(0.125, window=256)),
        "128 grouped documents": (32, 8, 128, torch.bfloat16, Sight(0.125, segments=segments)),
        "256 alibi": (16, 16, 256, torch.float16, Sight(0.125, slopes=slopes)),
    }
    return [Sample(f"attention {name} {str(shape[3])[6:]}", partial(_sample, *shape)) for name, shape in shapes.items()]


def _sample(heads: int, groups: int, dim: int, dtype: torch.dtype, sight: Sight, device: torch.device) -> None:
    shapes = [(4, 2048, count, dim) for count in (heads, groups, groups)]
    leaves = [torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    output = attention(query, key, value, sight)
    output.backward(torch.empty_like(output))
