"""What happens to the word embeddings before the first block: positions and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.cache import KVCache
from megatron.model.positions import ALONE, Span
from megatron.model.stream import Stream
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import Initializer, make_parameter
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec


class LearnedPositions(nn.Module):
    """hidden + multiplier * table[position + offset], with a table [max_position_embeddings, h].

    offset: rows to skip at the start (2 in OPT). multiplier: of the looked-up rows.
    """

    def __init__(
        self,
        num_positions: int,
        hidden_size: int,
        offset: int,
        multiplier: float,
        init: Initializer,
        region: TensorRegion,
        context: Axis = ALONE,
    ) -> None:
        super().__init__()
        self.offset = offset
        self.multiplier = multiplier
        self.region = region
        self.context = context
        spec = ShardSpec(sequence_partial=True)
        self.weight = make_parameter((num_positions, hidden_size), spec, Axis("replicated"), init)

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        positions = _positions(stream.hidden, cache, self.region, self.context) + self.offset
        rows = F.embedding(positions, self.weight)
        rows = rows if self.multiplier == 1.0 else rows * self.multiplier
        return stream._replace(hidden=stream.hidden + rows)


class SinusoidalPositions(nn.Module):
    """hidden + multiplier * [sin(p f), cos(p f)] with f_k = 10000^(-2 k / h) (Vaswani et al. 2017, in halves)."""

    def __init__(
        self, hidden_size: int, offset: int, multiplier: float, region: TensorRegion, context: Axis = ALONE
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.offset = offset
        self.multiplier = multiplier
        self.region = region
        self.context = context

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        positions = _positions(stream.hidden, cache, self.region, self.context) + self.offset
        waves = sinusoids(positions, self.hidden_size) * self.multiplier
        return stream._replace(hidden=stream.hidden + waves.to(stream.hidden.dtype))


class Dropout(nn.Module):
    """Dropout of the embedded tokens with `probability`."""

    def __init__(self, probability: float, region: TensorRegion) -> None:
        super().__init__()
        self.probability = probability
        self.region = region

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        return stream._replace(hidden=self.region.dropout(stream.hidden, self.probability, self.training))


def _positions(hidden: Tensor, cache: KVCache | None, region: TensorRegion, context: Axis) -> Tensor:
    """Return the position of each token of `hidden`, which is a part of the sequence under context parallelism, and a
    part of that under sequence parallelism."""
    length = hidden.shape[1] * (region.axis.size if region.splits_sequence else 1)
    return region.tokens(Span.of(length, cache, context).positions(hidden.device))


def sinusoids(positions: Tensor, hidden_size: int) -> Tensor:
    """Return [..., h] fp32 of integer positions [...]."""
    exponents = torch.arange(0, hidden_size, 2, dtype=torch.float32, device=positions.device) / hidden_size
    angles = positions.float().unsqueeze(-1) * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
