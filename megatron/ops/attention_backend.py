"""What a back end of attention is: one function, and a sentence for each thing that it cannot do.

backend(query, key, value, sight, dropout)        # computes, or raises UnservedError with that sentence
attend = first_of(backend, other)                 # computes with the first that can; PyTorch's SDPA can everything
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.ops.partial_attention import PartKernel
from megatron.ops.sight import Sight

Compute = Callable[[Tensor, Tensor, Tensor, Sight, float], Tensor]
"""compute(query [b, n, q, d], key [b, k, s, d], value [b, k, s, d], sight, dropout) -> [b, n, q, d]."""


class UnservedError(Exception):
    """A back end was asked for what it says it cannot do."""


class Attend(Protocol):
    """Attention, whatever computes it."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
        """Return [b, n, q, d] of query [b, n, q, d], key and value [b, k, s, d]; queries are the last of the keys.

        dropout: probability of dropping an attention weight.
        """
        ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    lacks(query, key, sight, dropout): why it cannot do this, or "". parts: its kernels for a part of the keys, or None.
    """

    name: str
    compute: Compute
    lacks: Callable[[Tensor, Tensor, Sight, float], str]
    parts: PartKernel | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
        """Return [b, n, q, d]; raises UnservedError where it cannot."""
        reason = self.lacks(query, key, sight, dropout)
        if reason:
            raise UnservedError(f"{self.name} {reason}")
        return self.compute(query, key, value, sight, dropout)


def sixteen_bits(query: Tensor, largest_head: int = 256) -> str:
    """Return why a GPU kernel for 16 bits cannot take these queries, or ""."""
    if query.device.type not in ("cuda", "meta"):
        return f"needs a CUDA device, and this is {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, and not {str(query.dtype)[6:]}"
    if query.shape[3] % 8 or query.shape[3] > largest_head:
        return f"takes heads of a multiple of 8 up to {largest_head} features, and not {query.shape[3]}"
    return ""


def without(sight: Sight, num_keys: int, dropout: float, can: Collection[str]) -> str:
    """Return the first thing that is asked for and that a back end has not, or "".

    can: what it has of window, segments, padding, slopes, bias and dropout.
    """
    asked = {
        "window": ("has no local windows", sight.is_windowed(num_keys)),
        "segments": ("has no documents", sight.segments is not None),
        "padding": ("has no left padding", sight.padding is not None),
        "slopes": ("has no alibi", sight.slopes is not None),
        "bias": ("has no learned biases", sight.bias is not None),
        "dropout": ("has no dropout", dropout > 0),
    }
    return next((reason for key, (reason, is_asked) in asked.items() if is_asked and key not in can), "")
