"""Attention by PyTorch's scaled_dot_product_attention: whichever of its kernels it takes, or one of them by name.

sdpa        any of them; where a flag does not say what is seen, with a mask of all pairs. On a CPU blocks of
            ours train, and leave out what is not seen
cudnn       NVIDIA's; causal or everything, 16 bits
flash       flash-attn 2 as PyTorch brings it; the same
efficient   xFormers'; takes masks too
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.ops.attention_backend import Backend, sixteen_bits, without
from megatron.ops.attention_cpu import LONGEST_KEPT, blocked_attention
from megatron.ops.sight import Sight

Blocked = Callable[[Tensor, Tensor, Tensor, Sight], Tensor]


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float, blocked: Blocked = blocked_attention
) -> Tensor:
    """Return [b, n, q, d]. blocked: what trains on a CPU."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    flag = _flag_is_enough(sight, num_queries, num_keys)
    if query.device.type == "cpu" and not dropout and _fits_blocks(query, key, sight, flag):
        return blocked(query, key, value, sight)
    if flag:
        causal, grouped = sight.causal and num_queries > 1, query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=sight.scale, enable_gqa=grouped
        )
    if sight.slopes is None and sight.bias is None:
        added = sight.mask(num_queries, num_keys, query.device)
    else:
        added = sight.added(num_queries, num_keys, query.device, query.dtype)
    if query.device.type == "cuda":  # whose kernels that take masks know no groups; without them all scores are held
        key, value = _ungrouped(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=added, dropout_p=dropout, scale=sight.scale, enable_gqa=grouped
    )


def _flag_is_enough(sight: Sight, num_queries: int, num_keys: int) -> bool:
    """Return whether is_causal says all of what is seen; PyTorch aligns it with the first key."""
    aligned = num_queries in (1, num_keys) or not sight.causal
    extra = sight.rowwise or sight.slopes is not None or sight.bias is not None or sight.is_windowed(num_keys)
    return aligned and not extra


def _fits_blocks(query: Tensor, key: Tensor, sight: Sight, flag: bool) -> bool:
    """Return whether a CPU computes it faster in blocks of ours. flag: whether is_causal says what is seen.

    PyTorch's kernel evaluates faster where it needs no mask, and trains faster in fp32 where P is computed twice:
    2,048 tokens take 121 ms of one core there and 139 ms here, in bf16 106 ms and 92 ms.
    """
    if query.shape[2] > key.shape[2] or sight.bias is not None or not sight.causal:
        return False
    if not flag:  # which blocks there are depends on values, which a compiler does not have
        return query.shape[2] > 1 and not (sight.rowwise and torch.compiler.is_compiling())
    keeps = query.dtype == torch.bfloat16 or key.shape[2] <= LONGEST_KEPT or query.shape[1] != key.shape[1]
    return keeps and query.requires_grad and torch.is_grad_enabled()


def _ungrouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def _everything(query: Tensor, key: Tensor, sight: Sight, dropout: float) -> str:
    return ""


def _flagged(query: Tensor, key: Tensor, sight: Sight, dropout: float) -> str:
    reason = sixteen_bits(query) or without(sight, key.shape[2], dropout, {"dropout"})
    if not reason and not _flag_is_enough(sight, query.shape[2], key.shape[2]):
        return f"aligns {query.shape[2]} causal queries with the first of {key.shape[2]} keys, and not with the last"
    return reason


def _by_cudnn(query: Tensor, key: Tensor, sight: Sight, dropout: float) -> str:
    if key.shape[2] == 1 or (query.shape[2] == 1 and dropout):
        return "takes neither a single key, nor dropout of a single query"
    return _flagged(query, key, sight, dropout)


def _on_a_gpu(query: Tensor, key: Tensor, sight: Sight, dropout: float) -> str:
    kind = query.device.type
    return "" if kind in ("cuda", "meta") else f"needs a CUDA device, and this is {kind}"


def _by(
    kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float
) -> Tensor:  # fmt: skip
    if kernel is SDPBackend.EFFICIENT_ATTENTION:
        key, value = _ungrouped(query, key, value)
    with sdpa_kernel(kernel):
        return sdpa(query, key, value, sight, dropout)


SDPA = Backend("sdpa", sdpa, _everything)
CUDNN = Backend("cudnn", partial(_by, SDPBackend.CUDNN_ATTENTION), _by_cudnn)
FLASH = Backend("flash", partial(_by, SDPBackend.FLASH_ATTENTION), _flagged)
EFFICIENT = Backend("efficient", partial(_by, SDPBackend.EFFICIENT_ATTENTION), _on_a_gpu)
