"""Rotary embedding on packed queries, keys and values: kernels of `megatron.ops.rotary.rotate_packed`.

Packed [b, s, k, g + 2, d] holds for each key-value head its g query heads, its key and its value. Forward turns the
first r features of queries and keys where they lie: nothing else is read or written. With g > 1 the query heads of a
token do not lie at equal distances, which attention needs, so queries go to a tensor of their own on the way. Backward
turns the gradients of queries and keys back while it packs them with those of the values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.triton.launch import Sample, operator, runs, start


@triton.jit
def _forward(
    packed, query, cos, sin, slots, length, table_rows, packed_batch, packed_token, query_batch, query_token,
    group: tl.constexpr, features: tl.constexpr, half: tl.constexpr,
    COPIES: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)  # of queries and keys, group by group
    pair = tl.arange(0, HALF)
    kv, inner = slot // (group + 1), slot % (group + 1)
    is_slot, is_query = slot < slots, inner < group
    start = batch * packed_batch + position * packed_token + (kv * (group + 2) + inner) * features
    inside = is_slot[:, None] & (pair < half)[None, :]
    source = packed + start[:, None] + pair[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    table = (token % table_rows) * half + pair
    cosine = tl.load(cos + table, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + table, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    turned_first = (first * cosine - second * sine).to(packed.dtype.element_ty)
    turned_second = (second * cosine + first * sine).to(packed.dtype.element_ty)
    if COPIES:
        place = batch * query_batch + position * query_token + (kv * group + inner) * features
        target = query + place[:, None] + pair[None, :]
        goes = inside & is_query[:, None]
        tl.store(target, turned_first, mask=goes)
        tl.store(target + half, turned_second, mask=goes)
        if REST > 0:
            other = 2 * half + tl.arange(0, REST)
            goes = (is_slot & is_query)[:, None] & (other < features)[None, :]
            rest = tl.load(packed + start[:, None] + other[None, :], mask=goes, other=0.0)
            tl.store(query + place[:, None] + other[None, :], rest, mask=goes)
        inside = inside & (inner == group)[:, None]
    tl.store(source, turned_first, mask=inside)
    tl.store(source + half, turned_second, mask=inside)


@triton.jit
def _backward(
    query, key, value, packed, cos, sin, slots, length, table_rows,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    group: tl.constexpr, features: tl.constexpr, half: tl.constexpr,
    SLOTS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)  # of queries, keys and values, group by group
    pair = tl.arange(0, HALF)
    kv, inner = slot // (group + 2), slot % (group + 2)
    is_query, is_key, is_value = inner < group, inner == group, inner == group + 1
    inside = (slot < slots)[:, None] & (pair < half)[None, :]
    from_query = query + (batch * query_batch + position * query_token + (kv * group + inner) * query_head)[:, None]
    from_key = key + (batch * key_batch + position * key_token + kv * key_head)[:, None]
    from_value = value + (batch * value_batch + position * value_token + kv * value_head)[:, None]
    to = packed + (token * slots + slot)[:, None] * features
    first = tl.load(from_query + pair[None, :], mask=inside & is_query[:, None], other=0.0).to(tl.float32)
    first += tl.load(from_key + pair[None, :], mask=inside & is_key[:, None], other=0.0).to(tl.float32)
    first += tl.load(from_value + pair[None, :], mask=inside & is_value[:, None], other=0.0).to(tl.float32)
    later = half + pair
    second = tl.load(from_query + later[None, :], mask=inside & is_query[:, None], other=0.0).to(tl.float32)
    second += tl.load(from_key + later[None, :], mask=inside & is_key[:, None], other=0.0).to(tl.float32)
    second += tl.load(from_value + later[None, :], mask=inside & is_value[:, None], other=0.0).to(tl.float32)
    table = (token % table_rows) * half + pair
    cosine = tl.load(cos + table, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + table, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    turned_first = tl.where(is_value[:, None], first, first * cosine + second * sine)
    turned_second = tl.where(is_value[:, None], second, second * cosine - first * sine)
    tl.store(to + pair[None, :], turned_first.to(packed.dtype.element_ty), mask=inside)
    tl.store(to + later[None, :], turned_second.to(packed.dtype.element_ty), mask=inside)
    if REST > 0:
        other = 2 * half + tl.arange(0, REST)
        inside = (slot < slots)[:, None] & (other < features)[None, :]
        rest = tl.load(from_query + other[None, :], mask=inside & is_query[:, None], other=0.0).to(tl.float32)
        rest += tl.load(from_key + other[None, :], mask=inside & is_key[:, None], other=0.0).to(tl.float32)
        rest += tl.load(from_value + other[None, :], mask=inside & is_value[:, None], other=0.0).to(tl.float32)
        tl.store(to + other[None, :], rest.to(packed.dtype.element_ty), mask=inside)


def _shape(slots: int, group: int, features: int, half: int, rest: int) -> dict[str, int]:
    """Return the constants of a tile of about 4096 features, of which `rest` of a head are not turned.

    What a head is made of is a constant too, so that the compiler knows which addresses are aligned.
    """
    pairs, others = max(triton.next_power_of_2(half), 8), triton.next_power_of_2(rest) if rest else 0
    together = min(triton.next_power_of_2(slots), triton.next_power_of_2(max(1, 4096 // (2 * pairs + others))))
    head = {"group": group, "features": features, "half": half}
    return {**head, "SLOTS": together, "HALF": pairs, "REST": others, "num_warps": 4}


@operator(mutates=("packed",))
def rotate_forward(packed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries and keys of packed [b, s, k, g + 2, d] in place; with g > 1, leave the queries and return them.

    cos, sin: [s, r/2], or [b s, r/2]. Returns queries [b, s, k g, d], or an empty tensor.
    """
    batch, length, kv_heads, width, features = packed.shape
    group, half, copies = width - 2, cos.shape[1], width > 3
    query = packed.new_empty((batch, length, kv_heads * group, features) if copies else (0, 0, 0, 0))
    if runs(packed) and packed.numel():
        slots = kv_heads * (group + 1)
        shape = _shape(slots, group, features, half, (features - 2 * half) if copies else 0)
        numbers = (slots, length, len(cos))
        strides = (packed.stride(0), packed.stride(1), query.stride(0), query.stride(1))
        grid = (batch * length, triton.cdiv(slots, shape["SLOTS"]))
        start(_forward, grid, packed, query, cos, sin, *numbers, *strides, COPIES=copies, **shape)
    return query


@operator()
def rotate_backward(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return packed [b, s, k, g + 2, d] of gradients [b, s, k g, d], [b, s, k, d] and [b, s, k, d], turned back."""
    batch, length, heads, features = query.shape
    kv_heads = key.shape[2]
    group, half = heads // kv_heads, cos.shape[1]
    packed = query.new_empty(batch, length, kv_heads, group + 2, features)
    if runs(packed) and packed.numel():
        slots = kv_heads * (group + 2)
        shape = _shape(slots, group, features, half, features - 2 * half)
        numbers = (slots, length, len(cos))
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        grid = (batch * length, triton.cdiv(slots, shape["SLOTS"]))
        start(_backward, grid, query, key, value, packed, cos, sin, *numbers, *strides, **shape)
    return packed


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(True)
        query = rotate_forward(packed, cos, sin)
        group = packed.shape[3] - 2
        return query if group > 1 else packed[:, :, :, 0], packed[:, :, :, group], packed[:, :, :, group + 1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        heads = (each if each.stride(-1) == 1 else each.contiguous() for each in gradients)
        return rotate_backward(*heads, *ctx.saved_tensors), None, None


def rotate_packed(packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`megatron.ops.rotary.rotate_packed`, in the memory of `packed`, which nobody may read afterwards."""
    if packed.stride()[2:] != (packed.shape[3] * packed.shape[4], packed.shape[4], 1):
        packed = packed.contiguous()
    tables = (table.reshape(-1, table.shape[-1]).contiguous() for table in (cos, sin))
    result: tuple[Tensor, Tensor, Tensor] = _Rotate.apply(packed, *tables)
    return result


def samples() -> list[Sample]:
    """Heads of GPT-NeoX-20B (a quarter turned), of a 7B LLaMA, and of a 70B one (8 queries to a key)."""
    shapes = {"64 x 96, 24 turned": (64, 1, 96, 24), "32 x 128": (32, 1, 128, 128), "8 x 8 x 128": (8, 8, 128, 128)}
    return [Sample(f"rotate_packed {name} bfloat16", partial(_sample, *shape)) for name, shape in shapes.items()]


def _sample(kv_heads: int, group: int, features: int, turned: int, device: torch.device) -> None:
    shape = (8, 2048, kv_heads, group + 2, features)
    packed = torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=True).view(shape)
    tables = (torch.empty(2048, turned // 2, device=device) for _ in range(2))
    heads = rotate_packed(packed, *tables)
    torch.autograd.backward(heads, [torch.empty_like(each) for each in heads])
