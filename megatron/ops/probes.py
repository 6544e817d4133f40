"""The inputs on which a candidate of an operation must agree with its formula before a run relies on it.

Each probe runs forward and backward on seeded values that every dtype can hold, at the run's hidden size and with odd
numbers of rows, and returns outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.ops.choice import Function
from megatron.ops.rotary import rotary_tables

_ROWS = 37


def _draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return leaves of the given shapes, whose values have few enough bits for every dtype."""
    generator = torch.Generator().manual_seed(len(shapes))
    values = (torch.randn(shape, generator=generator).mul(16).round().div(16) for shape in shapes)
    return [value.to(device, dtype).requires_grad_() for value in values]


def _results(outputs: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs and the gradients of leaves."""
    gradients = torch.autograd.grad(outputs, leaves, [each.detach() for each in upstream])
    return [*(output.detach() for output in outputs), *gradients]


def layer_norm(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Over the hidden dim, with gain and offset."""
    rows = (_ROWS, hidden_size)
    inputs, weight, bias, upstream = _draw(device, dtype, rows, (hidden_size,), (hidden_size,), rows)
    output = function(inputs, (hidden_size,), weight, bias, 1e-5)
    return _results([output], [inputs, weight, bias], [upstream])


def rms_norm(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Over the hidden dim."""
    rows = (_ROWS, hidden_size)
    inputs, weight, upstream = _draw(device, dtype, rows, (hidden_size,), rows)
    return _results([function(inputs, weight, 1e-5)], [inputs, weight], [upstream])


def add_layer_norm(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Over the hidden dim, with gain and offset, and a gradient of the sum from elsewhere."""
    rows = (_ROWS, hidden_size)
    one, two, weight, bias, *upstream = _draw(device, dtype, rows, rows, (hidden_size,), (hidden_size,), rows, rows)
    return _results(function(one, two, weight, bias, 1e-5), [one, two, weight, bias], upstream)


def add_rms_norm(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Over the hidden dim, with a gradient of the sum from elsewhere."""
    rows = (_ROWS, hidden_size)
    one, two, weight, *upstream = _draw(device, dtype, rows, rows, (hidden_size,), rows, rows)
    return _results(function(one, two, weight, 1e-5), [one, two, weight], upstream)


def rotate_packed(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """One query and three queries to a key; all features turned, and a part of them."""
    results = []
    for group, features, turned in ((1, 64, 64), (3, 80, 20)):
        heads = (2, 19, 2, features)
        packed, *upstream = _draw(
            device, dtype, (2, 19, 2, group + 2, features), (2, 19, 2 * group, features), heads, heads
        )
        cos, sin = rotary_tables(torch.arange(19, device=device), turned, 10000.0)
        outputs = function(packed.clone(), cos[:, None, None], sin[:, None, None])
        results += _results(outputs, [packed], upstream)
    return results


def bias_activation(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Four times the hidden size of features, with the bias and without."""
    wide = 4 * hidden_size
    inputs, bias, upstream = _draw(device, dtype, (_ROWS, wide), (wide,), (_ROWS, wide))
    output = function(inputs, bias)
    other = function(inputs, None)
    first = _results([output], [inputs, bias], [upstream[:, : output.shape[1]]])
    return [*first, *_results([other], [inputs], [upstream[:, : output.shape[1]]])]


def add_dropped(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """The mask of a seed, applied and passed back."""
    rows = (_ROWS, hidden_size)
    hidden, bias, residual, upstream = _draw(device, dtype, rows, (hidden_size,), rows, rows)
    output = function(hidden, bias, residual, 0.25, torch.tensor([0x123456789ABCDEF], device=device))
    return _results([output], [hidden, bias, residual], [upstream])
