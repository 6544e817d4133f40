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
from megatron.ops.sight import Sight

_ROWS = 37
_TOKENS = 197
"""Of attention: more than a block, and no multiple of one."""


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


def cross_entropy(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Losses, and gradients in the logits' place."""
    width = 4 * hidden_size + 1
    logits, labels = _draw(device, dtype, (_ROWS, width))[0].detach(), _spread(width, device)
    return [function(logits, labels, 1.0), logits]


def share_losses(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """The second half of a vocabulary, which has every second label, as if the first held nothing."""
    width = 4 * hidden_size + 1
    logits, labels = _draw(device, dtype, (_ROWS, width))[0].detach(), _spread(2 * width, device)
    return [function(logits, labels, 1.0, width, lambda statistics: statistics), logits]


def _spread(size: int, device: torch.device) -> Tensor:
    """Return a label for each row, from 0 to size - 1."""
    return torch.arange(_ROWS, device=device) * (size - 1) // (_ROWS - 1)


def masked_softmax(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Causal with a window, and a padding mask that hides everything from one sequence."""
    scores, upstream = _draw(device, dtype, (2, 3, 5, _ROWS), (2, 3, 5, _ROWS))
    mask = (torch.arange(_ROWS, device=device) < torch.tensor([[0], [20]], device=device))[:, None, None]
    windowed, padded = function(scores, 0.5, True, 7), function(scores, 0.5, False, None, mask)
    return [*_results([windowed], [scores], [upstream]), *_results([padded], [scores], [upstream])]


def attention(
    function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int, features: Sequence[str] = ()
) -> list[Tensor]:
    """Four heads of `hidden_size` features over two keys, and more tokens than a block; dropout of next to nothing."""
    length, heads = _TOKENS, 4
    shapes = [(2, length, heads, hidden_size), *[(2, length, 2, hidden_size)] * 2, (2, length, heads, hidden_size)]
    *leaves, upstream = _draw(device, dtype, *shapes)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device) if "alibi" in features else None
    bias = torch.linspace(-1, 1, heads * length, device=device).view(heads, 1, length) if "bias" in features else None
    columns = torch.arange(length, device=device)
    segments = torch.stack([columns // 50, (columns > length // 4).long()]) if "documents" in features else None
    window = length // 5 if "window" in features else None
    sight = Sight(hidden_size**-0.5, window, slopes, segments, bias=bias)
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    output = function(query, key, value, sight, 1e-9 if "dropout" in features else 0.0)
    return _results([output], leaves, [upstream.transpose(1, 2)])


def grouped_matmul(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Four experts, one of them without tokens."""
    inputs, weights, upstream = _draw(device, dtype, (_ROWS, hidden_size), (4, hidden_size, 96), (_ROWS, 96))
    weights = weights.detach().div(hidden_size**0.5).requires_grad_()
    output = function(inputs, weights, torch.tensor([0, 5, 5, 36, _ROWS], device=device))
    return _results([output], [inputs, weights], [upstream])


def selective_scan(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Sixteen states and gates, steps as small as those of training, and neither tokens nor channels fill a tile."""
    tokens = (1, _ROWS, 5)
    u, delta, z, upstream, b, c = _draw(device, dtype, *[tokens] * 4, *[(1, _ROWS, 16)] * 2)
    skip, bias = _draw(device, torch.float32, (5,), (5,))
    bias = bias.detach().sub(4.0).requires_grad_()
    a = -torch.arange(1.0, 17.0, device=device).repeat(5, 1).requires_grad_()
    arguments = [u, delta, a, b, c, skip, z, bias]
    return _results([function(*arguments)], arguments, [upstream])


def float8_linear(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """To three times 16 features, from an odd number of rows, with the bias and without."""
    hidden = -(-hidden_size // 16) * 16
    shapes = (_ROWS, hidden), (48, hidden), (48,), (_ROWS, 48)
    inputs, weight, bias, upstream = _draw(device, dtype, *shapes)
    weight = weight.detach().div(2 ** (hidden.bit_length() // 2)).requires_grad_()  # exactly, in every dtype
    first = _results([function(inputs, weight, bias)], [inputs, weight, bias], [upstream])
    return [*first, *_results([function(inputs, weight)], [inputs, weight], [upstream])]


def sum_of_squares(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """Two fp32 tensors, whatever the model's dtype; the mean, since all results are compared with one tolerance."""
    tensors = [leaf.detach() for leaf in _draw(device, torch.float32, (_ROWS, hidden_size), (_ROWS * hidden_size,))]
    return [function(tensors) / tensors[0].numel()]


def adamw_update_(function: Function, device: torch.device, dtype: torch.dtype, hidden_size: int) -> list[Tensor]:
    """One large step on two masters, and the weights that they are rounded into."""
    shapes = [(_ROWS, hidden_size), (3,)]
    lists = [[leaf.detach() for leaf in _draw(device, torch.float32, *shapes)] for _ in range(4)]
    lists[3] = [leaf.square() for leaf in lists[3]]
    weights = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    coefficient, step = torch.tensor(0.5, device=device), torch.tensor(3.0, device=device)
    function(*lists, weights, coefficient, step, 0.5, 0.75, 0.5, 1e-8, 1.0)
    return [*lists[1], *lists[2], *lists[3], *weights]
