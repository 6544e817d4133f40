"""Attention on a CPU by C++: whole (`flash.py`), or what stands between PyTorch's products, in place: attention.cpp.

The latter serves short sequences in bf16 on processors without products of bf16 pairs: there PyTorch's products of bf16
may be faster than those of fp32 that the whole kernel makes. 2 rows of 8 heads of 64 features, forward and backward on
one EPYC (Zen 4) core, milliseconds whole and in blocks: 512 tokens in bf16 14 and 19 (23 by products of fp32), in fp32
23 and 35; 2048 tokens of one row 90 and 182, in fp32 157 and 245.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.attention_backend import Backend, without
from megatron.ops.attention_cpu import EAGER, LONGEST_KEPT, Between, Block, blocked_attention
from megatron.ops.attention_sdpa import sdpa
from megatron.ops.cpu.flash import flash_attention, serves
from megatron.ops.cpu.library import DTYPES, has_bf16, is_plain, kernel
from megatron.ops.sight import Sight

_CAN = {"window", "segments", "padding", "slopes"}


class _InOnePass(Between):
    def probabilities_(self, scores: Tensor, block: Block) -> None:
        first, last, stride = _bounds(block)
        slopes = None if block.sight.slopes is None else block.sight.slopes.float().contiguous()
        kernel("deepy_seen_softmax", "ppippipfiiiiii")(
            scores.data_ptr(), scores.data_ptr(), DTYPES[scores.dtype], first, last, stride,
            None if slopes is None else slopes.data_ptr(), 1.0, *scores.shape, block.keys.start,
            block.queries.start + block.num_keys - block.num_queries - block.keys.start,
        )  # fmt: skip

    def gradient(self, gradient: Tensor, probabilities: Tensor, block: Block) -> Tensor:
        first, last, stride = _bounds(block)
        kernel("deepy_seen_softmax_gradient", "pppippifiiiii")(
            probabilities.data_ptr(), gradient.data_ptr(), gradient.data_ptr(), DTYPES[gradient.dtype], first, last,
            stride, 1.0, *gradient.shape, block.keys.start,
        )  # fmt: skip
        return gradient

    def add_(self, total: Tensor, part: Tensor) -> None:
        part = part.contiguous()
        kernel("deepy_add_rows", "pipiii")(
            total.data_ptr(), total.stride(0), part.data_ptr(), DTYPES[part.dtype], len(part), part[0].numel()
        )


def _bounds(block: Block) -> tuple[int, int, int]:
    """Return where the first and the last key of each query of the block stand, and the steps between rows."""
    bounds = block.sight.bounds(block.num_queries, block.num_keys, torch.device("cpu"))
    begin = block.queries.start * bounds.first.element_size()
    stride = bounds.first.shape[1] if len(bounds.first) > 1 else 0
    return bounds.first.data_ptr() + begin, bounds.last.data_ptr() + begin, stride


IN_ONE_PASS = _InOnePass()


def _blocked(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    is_ours = is_plain(query, key, value) and query.dtype == key.dtype == value.dtype
    return blocked_attention(query, key, value, sight, IN_ONE_PASS if is_ours else EAGER)


def _attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float) -> Tensor:
    if not dropout and is_plain(query, key, value) and serves(query, key, value, sight) and _pays(query, key):
        return flash_attention(query, key, value, sight)
    return sdpa(query, key, value, sight, dropout, _blocked)


def _pays(query: Tensor, key: Tensor) -> bool:
    return query.dtype != torch.bfloat16 or has_bf16() or key.shape[2] > LONGEST_KEPT


def _lacks(query: Tensor, key: Tensor, sight: Sight, dropout: float) -> str:
    if query.device.type != "cpu":
        return f"needs a CPU, and this is {query.device.type}"
    return without(sight, key.shape[2], dropout, _CAN)


CPP = Backend("cpp", _attend, _lacks)
