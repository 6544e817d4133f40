"""Attention by blocks of queries in one pass over memory, forward and backward: flash.cpp says how."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.cpu.library import DTYPES, kernel
from megatron.ops.sight import Bounds, Sight

LARGEST_HEAD = 256
"""Features of the largest head that the kernel has tiles for."""


def serves(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> bool:
    """Return whether `flash_attention` computes it well: several queries, and work for every thread.

    It says nothing of where the tensors are and what they hold (`library.is_plain`).
    """
    batch, _, queries, dim = query.shape
    fits = queries > 1 and dim <= LARGEST_HEAD and sight.bias is None and query.dtype == key.dtype == value.dtype
    return fits and batch * key.shape[1] >= torch.get_num_threads()


def flash_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """Return [b, n, q, d] from query [b, n, q, d], key and value [b, k, s, d]; queries are the last of the keys.

    sight: without a learned bias. Scores, softmax and sums are fp32. In memory the result is [b, q, n, d], as the next
    product wants it.
    """
    output: Tensor = _Flash.apply(query, key, value, sight)
    return output


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        query, key, value = (_with_whole_rows(each) for each in (query, key, value))
        batch, heads, length, dim = query.shape
        output = query.new_empty(batch, length, heads, dim).transpose(1, 2)
        logarithms = torch.empty(batch, heads, length)
        slopes = None if sight.slopes is None else sight.slopes.float().contiguous()
        bounds = sight.bounds(length, key.shape[2], query.device)
        kernel("deepy_attend", "pppppippp" + "ip" + "f" + "iiiiii")(
            *_addresses(query, key, value, output, logarithms), DTYPES[query.dtype],
            _strides(query, key, value, output), *_seen(bounds), _address(slopes), sight.scale, *_sizes(query, key),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, output, logarithms)
        ctx.bounds, ctx.slopes, ctx.scale = bounds, slopes, sight.scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logarithms = ctx.saved_tensors
        upstream = _with_whole_rows(upstream)
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        kernel("deepy_attend_back", "ppppppppp" + "ippp" + "ip" + "f" + "iiiiii")(
            *_addresses(query, key, value, output, upstream, logarithms, *gradients), DTYPES[query.dtype],
            _strides(query, key, value, output, upstream, *gradients), *_seen(ctx.bounds), _address(ctx.slopes),
            ctx.scale, *_sizes(query, key),
        )  # fmt: skip
        return *gradients, None


def _with_whole_rows(heads: Tensor) -> Tensor:
    return heads if heads.stride(3) == 1 else heads.contiguous()


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strides(*tensors: Tensor) -> Any:
    """Return what lies between rows of the batch, heads and tokens of each tensor, for the kernel."""
    steps: Sequence[int] = [step for tensor in tensors for step in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(steps))(*steps)


def _seen(bounds: Bounds) -> tuple[int, int, int]:
    """Return where the first and the last key of each query stand, and the step from row to row of the batch."""
    return bounds.first.data_ptr(), bounds.last.data_ptr(), bounds.first.shape[1] if len(bounds.first) > 1 else 0


def _sizes(query: Tensor, key: Tensor) -> tuple[int, ...]:
    batch, heads, length, dim = query.shape
    return batch, heads, key.shape[1], length, key.shape[2], dim
