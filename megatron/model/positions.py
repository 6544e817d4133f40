"""Where a token stands: tables and masks that all layers share, computed once per shape.

`Positions` knows the columns of the tokens at hand (those of a training batch start at 0, those of a decoding step at
the cache's length). `RotaryTables` and `AttentionMask` answer from a small store, so that neither is recomputed per
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.model.cache import KVCache
from megatron.ops.relative import alibi_slopes, relative_buckets
from megatron.ops.rotary import rotary_tables
from megatron.parallel.context import local_positions
from megatron.parallel.layers import Initializer, make_parameter
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec

ALONE = Axis("cp")
"""The context axis of one process."""


@dataclass(frozen=True)
class Span:
    """The columns [start, end) of the tokens at hand; keys are columns [0, end). padding: as in KVCache.

    context: the tokens at hand are this rank's on the context axis, a part of those columns.
    """

    start: int
    end: int
    padding: Tensor | None = None
    context: Axis = ALONE

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
        if self.context.size > 1:
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
    """What a layer adds to its scores, or hides of them, beyond plain causality.

    window: a token sees itself and the `window` tokens before it; None sees all.
    slopes: alibi slopes of this rank's heads [n], or None without alibi.
    """

    def __init__(self, window: int | None = None, slopes: Tensor | None = None) -> None:
        self.window = window
        self.slopes = slopes
        self._key: tuple[object, ...] = ()
        self._mask: Tensor | None = None

    def __call__(
        self, span: Span, segments: Tensor | None, bias: RelativePositionBias | None, hidden: Tensor
    ) -> Tensor | None:
        """Return None where plain causality says all, else bool (True is seen) or a bias, to [b, n, q, s].

        segments: [b, s] document numbers; a token sees its own document only.
        hidden: the layer's input, for its device and dtype.
        """
        if not self._is_needed(span, segments, bias):
            return None
        device = hidden.device
        mask = self._static(span, device, hidden.dtype)
        if _is_rowwise(span, segments):
            mask = _restrict(mask, _seen_by_row(span, segments, device))
        if bias is None:
            return mask
        table = bias(_distance(span, device))
        return table.masked_fill(~mask, float("-inf"))

    def store(self, span: Span, segments: Tensor | None, bias: RelativePositionBias | None, hidden: Tensor) -> None:
        """Compute what depends on the columns only, where a call with these arguments needs it and does not have it."""
        if self._is_needed(span, segments, bias):
            self._static(span, hidden.device, hidden.dtype)

    def _is_needed(self, span: Span, segments: Tensor | None, bias: RelativePositionBias | None) -> bool:
        windowed = self.window is not None and self.window < span.end - 1
        chunked = span.start > 0 and span.end - span.start > 1
        return windowed or chunked or _is_rowwise(span, segments) or self.slopes is not None or bias is not None

    def _static(self, span: Span, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the part that depends on the columns only: [q, s] bool, or [n, q, s] of `dtype` with alibi."""
        key = (span.start, span.end, device, dtype)
        if self._mask is None or key != self._key:
            with torch.inference_mode(False):
                self._key, self._mask = key, self._computed(_distance(span, device), dtype)
        return self._mask

    def _computed(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance <= self.window)
        return seen if self.slopes is None else self._alibi(distance, seen).to(dtype)

    def _alibi(self, distance: Tensor, seen: Tensor) -> Tensor:
        assert self.slopes is not None
        bias = -self.slopes.to(distance.device).view(-1, 1, 1) * distance
        return bias.masked_fill(~seen, float("-inf"))


def make_slopes(num_heads: int, axis: Axis) -> Tensor:
    """Return the alibi slopes of this rank's heads."""
    return alibi_slopes(num_heads).chunk(axis.size)[axis.rank]


def _distance(span: Span, device: torch.device) -> Tensor:
    """Return i - j for the span's queries i and all keys j: [q, s] int64."""
    columns = torch.arange(span.end, device=device)
    return columns[span.start :].unsqueeze(1) - columns.unsqueeze(0)


def _is_rowwise(span: Span, segments: Tensor | None) -> bool:
    return span.padding is not None or segments is not None


def _seen_by_row(span: Span, segments: Tensor | None, device: torch.device) -> Tensor:
    """Return [b, 1, q, s] bool: keys of the row's own document and not padding. A token always sees itself, so that
    padding has a finite output."""
    seen = _distance(span, device) == 0
    if span.padding is not None:
        tokens = torch.arange(span.end, device=device) >= span.padding.unsqueeze(1)
        seen = seen | tokens[:, None, None, :]
    if segments is not None:
        same = segments[:, span.start :].unsqueeze(2) == segments.unsqueeze(1)
        seen = (seen & same.unsqueeze(1)) if span.padding is not None else same.unsqueeze(1)
    return seen


def _restrict(mask: Tensor, seen: Tensor) -> Tensor:
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
