"""Queries, keys and values out of the joint projection, turned on the way, in one pass: rotary.cpp says how."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import rotary
from megatron.ops.cpu.library import DTYPES, is_plain, kernel

Heads = tuple[Tensor, Tensor, Tensor]


def rotate_packed(packed: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """`megatron.ops.rotary.rotate_packed`; in memory the results are [b, n, s, d], as attention multiplies them."""
    if not is_plain(packed, cos, sin) or cos.requires_grad or not _fit(packed, cos, sin):
        return rotary.rotate_packed(packed, cos, sin)
    heads: Heads = _RotatePacked.apply(packed, cos.flatten(-3).contiguous(), sin.flatten(-3).contiguous())
    return heads


def _fit(packed: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether the fp32 tables have a row for each token, of the batch's rows or of one for all."""
    rows, half = cos.shape[:-3], cos.shape[-1]
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype == torch.float32 and 2 * half <= packed.shape[-1]
    return alike and rows in (packed.shape[1:2], packed.shape[:2], (1, packed.shape[1]))


class _RotatePacked(torch.autograd.Function):
    """cos, sin: [s, r/2] or [b, s, r/2]."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        ctx.save_for_backward(cos, sin)
        batch, length, groups, rows, dim = packed.shape
        heads = [packed.new_empty(batch, count, length, dim) for count in (groups * (rows - 2), groups, groups)]
        _move(packed.contiguous(), heads, cos, sin, back=False)
        query, key, value = (part.transpose(1, 2) for part in heads)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads = [_dense(part).transpose(1, 2) for part in upstream]
        batch, groups, length, dim = heads[1].shape
        packed = heads[0].new_empty(batch, length, groups, heads[0].shape[1] // groups + 2, dim)
        _move(packed, heads, cos, sin, back=True)
        return packed, None, None


def _dense(heads: Tensor) -> Tensor:
    """Return the same with the features of a head next to each other."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _move(packed: Tensor, heads: list[Tensor], cos: Tensor, sin: Tensor, back: bool) -> None:
    """Fill the heads [b, n, s, d] from packed [b, s, k, n/k + 2, d], or, where `back`, the other way round."""
    batch, length, groups, rows, dim = packed.shape
    strides = (ctypes.c_int64 * 9)(*(stride for part in heads for stride in part.stride()[:3]))
    table_stride = cos.shape[-2] * cos.shape[-1] if cos.dim() == 3 and len(cos) > 1 else 0
    kernel("deepy_split_heads", "ppppipppiiiiiiii")(
        packed.data_ptr(), *(part.data_ptr() for part in heads), DTYPES[packed.dtype], strides,
        cos.data_ptr(), sin.data_ptr(), table_stride,
        batch, length, groups, rows - 2, dim, cos.shape[-1], back,
    )  # fmt: skip
