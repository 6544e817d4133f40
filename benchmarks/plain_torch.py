"""Each operation of `beside_torch.py` as a good PyTorch user writes it without this library: one function each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.layer_norm(inputs, weight.shape, weight, bias, 1e-5)


def rms_norm(inputs: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.rms_norm(inputs, weight.shape, weight, 1e-5)


def add_layer_norm(inputs: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, then its norm."""
    total = residual + inputs
    return layer_norm(total, weight, bias), total


def add_rms_norm(inputs: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, then its norm."""
    total = residual + inputs
    return rms_norm(total, weight), total


def rotary(packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As models of transformers have it: heads of [b, s, k, 3, d] in attention's layout, and tables [s, d] of the
    inputs' dtype that hold each angle twice."""
    query, key, value = (packed[:, :, :, index].transpose(1, 2) for index in range(3))
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin, value


def _rotate_half(inputs: Tensor) -> Tensor:
    first, second = inputs.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def bias_gelu(inputs: Tensor, bias: Tensor) -> Tensor:
    """The exact form of the sum."""
    return F.gelu(inputs + bias)


def bias_gelu_tanh(inputs: Tensor, bias: Tensor) -> Tensor:
    """The tanh form of the sum."""
    return F.gelu(inputs + bias, approximate="tanh")


def swiglu(inputs: Tensor) -> Tensor:
    """Of one projection with both halves."""
    value, gate = inputs.chunk(2, dim=-1)
    return F.silu(gate) * value


def geglu(inputs: Tensor) -> Tensor:
    """Of one projection with both halves."""
    value, gate = inputs.chunk(2, dim=-1)
    return F.gelu(gate) * value


def add_dropped(hidden: Tensor, residual: Tensor) -> Tensor:
    """A tenth of the branch dropped."""
    return residual + F.dropout(hidden, 0.1)


def causal_softmax(scores: Tensor, is_hidden: Tensor) -> Tensor:
    """In the scores' dtype. is_hidden: the mask's complement, made once."""
    return torch.softmax((scores * 0.125).masked_fill(is_hidden, float("-inf")), dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens, in fp32, as training scripts have it."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same behind the projection onto the vocabulary."""
    return cross_entropy(F.linear(hidden, weight), labels)


def adamw(optimizer: torch.optim.AdamW, parameters: list[Tensor]) -> None:
    """Clip to a norm of 1 and update. optimizer: with fused=True."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
