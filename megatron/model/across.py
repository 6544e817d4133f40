"""Attention where each rank of the context axis holds a part of the sequence; `parallel/context.py` says how.

Attention of one process is the twin: a layer has one of these methods only where the context axis has several ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron.model.positions import AttentionMask, RelativePositionBias, Span
from megatron.ops.attention import attention
from megatron.ops.attention_backend import Attend
from megatron.ops.partial_attention import NO_KERNELS, PartKernels
from megatron.ops.sight import Sight
from megatron.parallel.context import heads_to_sequence, ring_attention, sequence_to_heads
from megatron.parallel.mesh import Axis


class Asked(NamedTuple):
    """What attention of this rank's tokens is asked for.

    query: [b, n, s/C, d]; key, value: [b, k, s/C, d]. mask, rpe: of this layer. segments: [b, s], of the whole
    sequence. dropout: of attention probabilities.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: AttentionMask
    segments: Tensor | None
    rpe: RelativePositionBias | None
    dropout: float


class AcrossRanks(Protocol):
    """Attention of this rank's tokens over the tokens of all ranks of the context axis."""

    @property
    def axis(self) -> Axis:
        """The context axis."""
        ...

    def __call__(self, asked: Asked) -> Tensor:
        """Return [b, n, s/C, d]."""
        ...


@dataclass(frozen=True)
class RingAcrossRanks:
    """Keys and values go round; the config's rules keep rpe and dropout away from it.

    kernels: what computes its parts.
    """

    axis: Axis
    kernels: PartKernels = NO_KERNELS

    def __call__(self, asked: Asked) -> Tensor:
        if asked.rpe is not None or asked.dropout:
            raise ValueError("ring attention has neither relative position biases nor dropout")
        slopes = asked.mask.slopes_on(asked.query.device)
        sight = Sight(asked.scale, asked.mask.window, slopes, asked.segments)
        return ring_attention(asked.query, asked.key, asked.value, sight, self.axis, self.kernels)


@dataclass(frozen=True)
class HeadsAcrossRanks:
    """Each rank computes a share of the heads over the whole sequence. attend: what computes it."""

    axis: Axis
    attend: Attend = attention

    def __call__(self, asked: Asked) -> Tensor:
        query, key, value = (sequence_to_heads(each, self.axis) for each in (asked.query, asked.key, asked.value))
        length = query.shape[2]
        sight = asked.mask(asked.scale, Span(0, length), asked.segments, asked.rpe, query.device)
        if sight.slopes is not None:  # of this rank's heads
            sight = replace(sight, slopes=sight.slopes.chunk(self.axis.size)[self.axis.rank])
        if sight.bias is not None:
            sight = replace(sight, bias=sight.bias.chunk(self.axis.size, dim=-3)[self.axis.rank])
        attended = self.attend(query, key, value, sight, asked.dropout)
        return heads_to_sequence(attended, self.axis)


def make_across(
    axis: Axis, method: str, attend: Attend = attention, kernels: PartKernels = NO_KERNELS
) -> AcrossRanks | None:
    """Return the method of `context_parallel_method`, or None on an axis of one rank.

    attend: attention of one process. kernels: what computes parts of it.
    """
    if axis.size == 1:
        return None
    return RingAcrossRanks(axis, kernels) if method == "ring" else HeadsAcrossRanks(axis, attend)
