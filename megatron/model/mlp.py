"""The feed-forward part of a block.

plain: y = W2 act(W1 x + b1) + b2
gated: [value; gate] = W1 x + b1;  y = W2 (act(gate) * value) + b2
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from megatron.model.made_again import made_again
from megatron.model.recompute import recomputed
from megatron.ops.activations import Activation, BiasActivation
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import ColumnParallelLinear, Initializer, RowParallelLinear


class MLP(nn.Module):
    """x [b, s, h] -> [b, s, h], between `TensorRegion.enter` and `leave`: what it returns is this rank's part.

    linear1_rows, linear2_columns: the two widths; a gated MLP has twice as many rows as columns.
    activation: maps linear1's output to linear2's input. recompute: compute it again in the backward pass.
    fused: the activation together with linear1's bias, where a kernel computes both, or None.
    """

    def __init__(
        self,
        hidden_size: int,
        linear1_rows: int,
        linear2_columns: int,
        gated: bool,
        activation: Activation,
        region: TensorRegion,
        init: Initializer,
        output_init: Initializer,
        bias: bool,
        recompute: bool = False,
        fused: BiasActivation | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.recompute = recompute
        self.inside = fused
        """The activation that linear1 ends with, or None."""
        self._made_of: tuple[Tensor, ...] = ()
        blocks, ends = 2 if gated else 1, None if fused is None else self._end
        self.linear1 = ColumnParallelLinear(hidden_size, linear1_rows, region, init, bias, blocks, ends)
        self.linear2 = RowParallelLinear(linear2_columns, hidden_size, region, output_init, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.inside is not None:
            features = self.linear1(hidden)  # which keeps nothing but what the activation is made of
            with self._made_again(features):
                result: Tensor = self.linear2(features)
            return result
        wide = self.linear1(hidden)
        if not self.recompute:
            output: Tensor = self.linear2(self.activation(wide))
            return output
        with made_again(features := recomputed(self.activation, wide, draws=False), self.activation, wide):
            narrow: Tensor = self.linear2(features)
            return narrow

    def _end(self, wide: Tensor, bias: Tensor | None) -> Tensor:
        """Return the activation of linear1's product and bias, which are whole only while linear1 runs."""
        assert self.inside is not None
        if self.recompute:
            self._made_of = (wide,) if bias is None else (wide, bias.detach().clone())
        return self.inside(wide, bias)

    def _made_again(self, features: Tensor) -> AbstractContextManager[Any]:
        """Return the context in which linear2 keeps how its input was made, where that is wanted."""
        inside, made_of = self.inside, self._made_of
        self._made_of = ()
        if inside is None or not made_of:
            return nullcontext()
        return made_again(features, lambda wide, bias=None: inside(wide, bias), *made_of)
