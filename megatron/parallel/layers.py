"""The linear maps and the vocabulary table that can be split over the tensor axis.

    Column: y = x W^T + b, rows of W and b split; its output is a share of the features.
    Row:    y = x W^T + b, columns of W split; its input is a share of the features, b is whole.
    Vocabulary: rows of the table split.

Column and row layers do not communicate: x has entered the region before (`TensorRegion.enter`), and the row layer's
y is partial, to be summed once by `TensorRegion.leave`, together with other partial results where a block adds them
up anyway. On an axis of size 1 each is the plain formula. The ShardSpec is attached to each parameter. Weights are made
uninitialised, in torch's default dtype on its default device; each parameter carries the `Initializer` that
`megatron.model.init` runs once its canonical name is known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.ops.linear import linear
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec, local_shape, set_spec

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, W, b) -> x W^T + b."""

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Draws the full tensor of a shape, in fp32 on the CPU."""

_ATTRIBUTE = "initializer"


def make_parameter(shape: tuple[int, ...], spec: ShardSpec, axis: Axis, initializer: Initializer) -> nn.Parameter:
    """Return an uninitialised parameter holding this rank's share of a tensor of the full `shape`."""
    parameter = nn.Parameter(torch.empty(local_shape(shape, spec, axis.size)))
    set_spec(parameter, spec)
    setattr(parameter, _ATTRIBUTE, initializer)
    return parameter


def get_initializer(parameter: Tensor) -> Initializer:
    """Return the initializer that `make_parameter` attached."""
    initializer: Initializer = getattr(parameter, _ATTRIBUTE)
    return initializer


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initializer of biases and offsets."""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initializer of gains."""
    return torch.ones(shape)


class ColumnParallelLinear(nn.Module):
    """y [..., out/tp] = x [..., in] W^T + b, with W [out, in] and b [out] split by rows.

    blocks: equal parts of the rows that are split separately (2 for the [value; gate] rows of a gated MLP).
    activation: (x W^T, b) -> y, which adds the bias on its way, in the place of the sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        region: TensorRegion,
        initializer: Initializer,
        bias: bool,
        blocks: int = 1,
        activation: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        super().__init__()
        spec, axis = ShardSpec(dim=0, blocks=blocks), region.axis
        self.weight = make_parameter((out_features, in_features), spec, axis, initializer)
        self.bias = make_parameter((out_features,), spec, axis, zeros) if bias else None
        self.activation = activation
        self.product: Product = linear

    def forward(self, inputs: Tensor) -> Tensor:
        if self.activation is not None:
            return self.activation(self.product(inputs, self.weight, None), self.bias)
        return self.product(inputs, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's part of y [..., out] = x [..., in/tp] W^T + b, with W [out, in] split by columns and b [out] whole.

    Each rank adds b / tp, so that the sum over ranks holds it once; each has the whole gradient of b.
    """

    def __init__(
        self, in_features: int, out_features: int, region: TensorRegion, initializer: Initializer, bias: bool
    ) -> None:
        super().__init__()
        self.region = region
        self.weight = make_parameter((out_features, in_features), ShardSpec(dim=1), region.axis, initializer)
        self.bias = make_parameter((out_features,), ShardSpec(), region.axis, zeros) if bias else None
        self.product: Product = linear

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.region.once(self.bias)
        return self.product(inputs, self.weight, bias)


def multiply_by(product: Product, module: nn.Module) -> None:
    """Let the linear layers within a module compute x W^T + b by `product`."""
    for layer in module.modules():
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            layer.product = product


class VocabParallelEmbedding(nn.Module):
    """Rows of a table [v, h], split by rows: tokens [b, s] int64 -> [b, s, h] ([b, s/tp, h], `TensorRegion.leave`)."""

    def __init__(self, num_tokens: int, hidden_size: int, region: TensorRegion, initializer: Initializer) -> None:
        super().__init__()
        self.region = region
        self.weight = make_parameter((num_tokens, hidden_size), ShardSpec(dim=0), region.axis, initializer)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.region.is_split:
            return F.embedding(tokens, self.weight)
        local = tokens - self.region.axis.rank * len(self.weight)
        is_mine = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(local.clamp(0, len(self.weight) - 1), self.weight)
        return self.region.leave(rows * is_mine.unsqueeze(-1))
