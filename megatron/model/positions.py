"""Where a token stands: tables and masks that all layers share, computed once per shape.

`Positions` knows the columns of the tokens at hand (those of a training batch start at 0, those of a decoding step at
the cache's length). `RotaryTables` and `AttentionMask` answer from a small store, so that neither is recomputed per
layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron.model.cache import KVCache
from megatron.ops.relative import alibi_slopes, relative_buckets
from megatron.ops.rotary import rotary_tables
from megatron.ops.sight import Sight
from megatron.parallel.context import local_positions
from megatron.parallel.layers import Initializer, make_parameter
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec

ALONE = Axis("cp")
"""The context axis of one process."""


@dataclass(frozen=True)
class Span:
    """The columns [start, end) of the tokens at hand; keys are columns [0, end). padding: as in KVCache.

    context: the tokens at hand are this rank's on that context axis, a part of those columns; None: all of them are.
        (An Axis as the default is one that torch.compile of PyTorch 2.11 cannot trace.)
    """

    start: int
    end: int
    padding: Tensor | None = None
    context: Axis | None = None

    @classmethod
    def of(cls, length: int, cache: KVCache | None, context: Axis = ALONE) -> Span:
        """Return the span of `length` tokens that follow what the cache holds.

        Raises ValueError for a cache on a context axis of several ranks: decoding is not divided along the sequence.
        """
        if cache is None:
            return cls(0, length * context.size, context=context)
        if context.size > 1:
            raise ValueError("a KVCache needs a model with context_parallel_size 1")
        return cls(cache.length, cache.length + length, cache.padding)

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of each token in its document: [s] int64, or [b, s] where rows are padded."""
        if self.context is not None and self.context.size > 1:
            return local_positions(self.context, self.end, device)
        columns = torch.arange(self.start, self.end, device=device)
        if self.padding is None:
            return columns
        return (columns - self.padding.unsqueeze(1)).clamp(min=0)


class RotaryTables:
    """cos and sin of rotary dim `dim`, kept for the last span asked for."""

    def __init__(self, dim: int, base: float) -> None:
        self.dim = dim
        self.base = base
        self._key: tuple[object, ...] = ()
        self._padding: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, span: Span, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin, fp32, shaped [s, 1, 1, r/2] or [b, s, 1, 1, r/2] to broadcast over groups and heads."""
        key = (span.start, span.end, device)
        if self._tables is None or key != self._key or span.padding is not self._padding:
            with torch.inference_mode(False):  # tables made while generating must serve training too
                cos, sin = rotary_tables(span.positions(device), self.dim, self.base)
            self._key, self._tables = key, (cos[..., None, None, :], sin[..., None, None, :])
            self._padding = span.padding  # the tensor itself: an id alone may be that of a later tensor
        return self._tables


class RelativePositionBias(nn.Module):
    """The table [buckets, n] of T5's relative positions; all layers of a model share one."""

    def __init__(
        self, num_buckets: int, max_distance: int, num_heads: int, scale: float, axis: Axis, initializer: Initializer
    ) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.scale = scale
        self.weight = make_parameter((num_buckets, num_heads), ShardSpec(dim=1), axis, initializer)

    def forward(self, distance: Tensor) -> Tensor:
        """Return the bias [n, q, s] of distances [q, s] int64."""
        buckets = relative_buckets(distance, self.num_buckets, self.max_distance)
        return self.scale * nn.functional.embedding(buckets, self.weight).permute(2, 0, 1)


class AttentionMask:
    """What a layer hides of its scores, or adds to them, beyond plain causality.

    window: a token sees itself and the `window` tokens before it; None sees all.
    slopes: alibi slopes of this rank's heads [n], or None without alibi.
    """

    def __init__(self, window: int | None = None, slopes: Tensor | None = None) -> None:
        self.window = window
        self.slopes = slopes
        self._sight: Sight | None = None

    def __call__(
        self, scale: float, span: Span, segments: Tensor | None, bias: RelativePositionBias | None, device: torch.device
    ) -> Sight:
        """Return what the span's tokens see. The layers that share this mask get one Sight, and what it has made.

        segments: [b, s] document numbers; a token sees its own document only.
        """
        slopes, sight = self.slopes_on(device), self._sight
        if sight is None or torch.compiler.is_compiling() or not self._is_of(sight, span, segments):
            sight = Sight(scale, self.window, slopes, segments, span.padding)
        elif sight.scale != scale:  # what a Sight has made does not depend on it
            sight = replace(sight, scale=scale)
        if not torch.compiler.is_compiling():  # what a graph makes is its own
            self._sight = sight
        return sight if bias is None else replace(sight, bias=bias(_distance(span, device)))

    def slopes_on(self, device: torch.device) -> Tensor | None:
        """Return the slopes on a device, where they stay: a copy at each call would make the host wait for a GPU."""
        if self.slopes is not None and self.slopes.device != device:
            with torch.inference_mode(False):  # what is moved while generating must serve training too
                self.slopes = self.slopes.to(device)
            self._sight = None
        return self.slopes

    @staticmethod
    def _is_of(sight: Sight, span: Span, segments: Tensor | None) -> bool:
        return sight.segments is segments and sight.padding is span.padding


def make_slopes(num_heads: int, axis: Axis) -> Tensor:
    """Return the alibi slopes of this rank's heads."""
    return alibi_slopes(num_heads).chunk(axis.size)[axis.rank]


def _distance(span: Span, device: torch.device) -> Tensor:
    """Return i - j for the span's queries i and all keys j: [q, s] int64."""
    columns = torch.arange(span.end, device=device)
    return columns[span.start :].unsqueeze(1) - columns.unsqueeze(0)
