"""The feed-forward part of a block.

plain: y = W2 act(W1 x + b1) + b2
gated: [value; gate] = W1 x + b1;  y = W2 (act(gate) * value) + b2
"""

from __future__ import annotations

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
        self.activation = activation if fused is None else lambda wide: fused(wide, None)
        self.recompute = recompute
        self.is_fused = fused is not None
        """Whether the activation keeps nothing but its input."""
        self.inside = fused if not recompute else None
        """The activation that linear1 ends with; what is computed again must begin behind its product."""
        blocks = 2 if gated else 1
        self.linear1 = ColumnParallelLinear(hidden_size, linear1_rows, region, init, bias, blocks, self.inside)
        self.linear2 = RowParallelLinear(linear2_columns, hidden_size, region, output_init, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.inside is not None:
            result: Tensor = self.linear2(self.linear1(hidden))
            return result
        wide = self.linear1(hidden)
        if not self.recompute:
            output: Tensor = self.linear2(self.activation(wide))
            return output
        features = self.activation(wide) if self.is_fused else recomputed(self.activation, wide, draws=False)
        with made_again(features, self.activation, wide):
            narrow: Tensor = self.linear2(features)
            return narrow
