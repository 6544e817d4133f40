"""What `kernels.py` measures: each operation with its inputs, and the values that its passes cannot avoid to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.ops.rotary import rotary_tables

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Work:
    """An operation of the catalogue.

    inputs(tokens, hidden, draw): the arguments, of which floating tensors that `draw` returns have gradients.
    forward, backward: values of the dtype read and written for each token, by hidden size.
    """

    operation: str
    inputs: Callable[[int, int, Callable[..., Tensor]], Arguments]
    forward: Callable[[int], float]
    backward: Callable[[int], float]


def _norm(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, hidden), (hidden,), draw(hidden), draw(hidden), 1e-5


def _rms_norm(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, hidden), draw(hidden), 1e-5


def _add_norm(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, hidden), draw(tokens, hidden), draw(hidden), draw(hidden), 1e-5


def _add_rms_norm(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, hidden), draw(tokens, hidden), draw(hidden), 1e-5


def _packed(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """Heads of 64 features, all of which turn; rows of up to 2048 tokens."""
    length, heads = min(2048, tokens), hidden // 64
    packed = draw(tokens // length, length, heads, 3, 64)
    cos, sin = rotary_tables(torch.arange(length, device=packed.device), 64, 10000.0)
    return packed, cos[:, None, None], sin[:, None, None]


def _wide(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, 4 * hidden), draw(4 * hidden)


def _gated(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, 8 * hidden), draw(8 * hidden)


def _residual(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    return draw(tokens, hidden), draw(hidden), draw(tokens, hidden), 0.1


def _times(factor: float) -> Callable[[int], float]:
    return lambda hidden: factor * hidden


WORKS: tuple[Work, ...] = (
    Work("layer_norm", _norm, _times(2), _times(3)),
    Work("rms_norm", _rms_norm, _times(2), _times(3)),
    Work("add_layer_norm", _add_norm, _times(4), _times(4)),
    Work("add_rms_norm", _add_rms_norm, _times(4), _times(4)),
    Work("rotate_packed", _packed, _times(4), _times(6)),
    Work("bias_gelu", _wide, _times(8), _times(12)),
    Work("bias_gelu_tanh", _wide, _times(8), _times(12)),
    Work("bias_swiglu", _gated, _times(12), _times(20)),
    Work("bias_geglu", _gated, _times(12), _times(20)),
    Work("add_dropped", _residual, _times(3), _times(2)),
)
