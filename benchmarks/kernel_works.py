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
    forward, backward: values of the dtype read and written for each token, by hidden size. backward: None where there
        is no backward pass: the gradient is made in the forward pass, or none is.
    value_bytes: bytes of a value where it is not one of the dtype.
    aims: shares of a copy's bandwidth, forward and backward; 0 where something else is the limit.
    """

    operation: str
    inputs: Callable[[int, int, Callable[..., Tensor]], Arguments]
    forward: Callable[[int], float]
    backward: Callable[[int], float] | None
    value_bytes: int | None = None
    aims: tuple[float, float] = (0.85, 0.75)


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


def _logits(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """The vocabulary of GPT-NeoX, whatever the hidden size; the logits become their gradients."""
    logits = draw(tokens, _VOCABULARY).detach()
    return logits, torch.randint(0, _VOCABULARY, (tokens,), device=logits.device), 1.0


def _half_logits(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """The second of two shares of that vocabulary; nothing goes over a network."""
    logits = draw(tokens, _VOCABULARY // 2).detach()
    labels = torch.randint(0, _VOCABULARY, (tokens,), device=logits.device)
    return logits, labels, 1.0, _VOCABULARY // 2, lambda statistics: statistics


def _scores(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """A head for 256 features, causal over rows of up to 1024 tokens."""
    length = min(1024, tokens)
    return draw(tokens // length, hidden // 256, length, length), 0.125, True


def _experts(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """Eight square experts, whose shares of the tokens are between 1/36 and 8/36."""
    inputs, weights = draw(tokens, hidden), draw(8, hidden, hidden)
    bounds = [tokens * expert * (expert + 1) // 72 for expert in range(9)]
    return inputs, weights, torch.tensor(bounds, device=inputs.device)


def _scan(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """Sixteen states for each feature, rows of up to 512 tokens."""
    length = min(512, tokens // 4)
    rows = (tokens // length, length)
    u, delta, z = (draw(*rows, hidden) for _ in range(3))
    a = (-draw(hidden, 16).detach().float().exp()).requires_grad_()
    return u, delta, a, draw(*rows, 16), draw(*rows, 16), draw(hidden), z, draw(hidden)


def _masters(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    """tokens x hidden parameters in 16 tensors, with bf16 weights."""
    shape = (tokens // 16, hidden)
    device = draw(1).device
    lists = [[torch.rand(shape, device=device) for _ in range(16)] for _ in range(4)]
    weights = [master.bfloat16() for master in lists[1]]
    one = torch.ones((), device=device)
    return *lists, weights, 0.5 * one, 10 * one, 1e-4, 0.9, 0.95, 1e-8, 0.1


def _gradients(tokens: int, hidden: int, draw: Callable[..., Tensor]) -> Arguments:
    device = draw(1).device
    return ([torch.rand(tokens * hidden, device=device)],)


_VOCABULARY = 50304


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
    Work("cross_entropy", _logits, lambda hidden: 2 * _VOCABULARY, None, aims=(0.7, 0)),
    Work("share_losses", _half_logits, lambda hidden: _VOCABULARY, None, aims=(0.7, 0)),
    # Half of what is causal need not be read.
    Work("masked_softmax", _scores, lambda hidden: hidden // 256 * 1024 * 1.5, lambda hidden: hidden // 256 * 1024 * 2),
    Work("grouped_matmul", _experts, _times(2), _times(4), aims=(0, 0)),
    Work("selective_scan", _scan, _times(4), _times(7), aims=(0, 0)),
    Work("adamw_update_", _masters, _times(30), None, value_bytes=1, aims=(0.85, 0)),
    Work("sum_of_squares", _gradients, _times(4), None, value_bytes=1, aims=(0.85, 0)),
)
