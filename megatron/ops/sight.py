"""What queries see of keys: a few numbers for each token, and never a matrix of all pairs.

    sight = Sight(scale=0.125, window=256, segments=documents)
    first, last, begin, end = sight.bounds(num_queries, num_keys, device)

Query i sees the keys [first_i, last_i], and neither falls as i rises, because documents are runs of tokens and padding
stands at the left. Back ends that skip what is not seen need only that; those that cannot take `mask` and `added`,
which hold a value for each pair. All are made once for a Sight, which the layers of a model share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept")


class Bounds(NamedTuple):
    """Which keys a query sees, and which queries a key; int32, of each row of the batch or of one for all.

    first, last: [b, q], columns of the first and the last key that a query sees; first > last: none.
    begin, end: [b, s], the first and the last query that see a key.
    """

    first: Tensor
    last: Tensor
    begin: Tensor
    end: Tensor


@dataclass(frozen=True, eq=False)
class Sight:
    """What tokens see: themselves and the tokens before them, within limits. Queries are the last of the keys.

    scale: of the scores. window: tokens before oneself that are seen, or None for all.
    slopes: [n] alibi slopes, whose bias is -slope * distance, or None.
    segments: [b, s] document numbers of the whole sequence, each a run of tokens; only the own document is seen. Or
        None.
    padding: [b] leading tokens of each row that are none, and seen by none but themselves, or None.
    bias: added to the scores, [.., q, s], with a gradient; or None.
    causal: False lets tokens see those after them too, which have neither window nor padding then.
    """

    scale: float
    window: int | None = None
    slopes: Tensor | None = None
    segments: Tensor | None = None
    padding: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = True
    _kept: dict[str, tuple[tuple[object, ...], Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.causal or (self.window is None and self.padding is None), "window and padding are causal"

    @property
    def rowwise(self) -> bool:
        """Whether rows of the batch see different columns."""
        return self.segments is not None or self.padding is not None

    def is_windowed(self, num_keys: int) -> bool:
        """Return whether the window hides any of the keys."""
        return self.window is not None and self.window < num_keys - 1

    def bounds(self, num_queries: int, num_keys: int, device: torch.device) -> Bounds:
        """Return the bounds of the last q of s tokens."""

        def compute() -> Bounds:
            columns = torch.arange(num_keys, device=device)
            return self.bounds_of(_last(num_queries, num_keys, device), columns)

        return self._keep("bounds", (num_queries, num_keys, device), compute)

    def bounds_of(self, queries: Tensor, keys: Tensor) -> Bounds:
        """Return the bounds of queries and keys that stand at these ascending positions, [q] and [s] int64."""
        lowest, highest = self._reach(queries)
        first = torch.searchsorted(keys, lowest)
        last = torch.searchsorted(keys, highest, right=True) - 1
        columns = torch.arange(len(keys), device=keys.device).expand(len(first), -1).contiguous()
        begin = torch.searchsorted(last, columns)
        end = torch.searchsorted(first, columns, right=True) - 1
        return Bounds(*(each.to(torch.int32) for each in (first, last, begin, end)))

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Return which keys the last q of s tokens see, bool to [b, n, q, s]; None where they see all of them."""
        trivial = num_queries == 1 or not self.causal
        if trivial and not self.rowwise and not self.is_windowed(num_keys):
            return None

        def compute() -> Tensor:
            columns = torch.arange(num_keys, device=device)
            return self.seen(_last(num_queries, num_keys, device), columns)

        return self._keep("mask", (num_queries, num_keys, device), compute)

    def added(self, num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores, to [b, n, q, s] of `dtype`, -inf where nothing is seen; None: nothing."""
        mask = self.mask(num_queries, num_keys, device)
        if self.slopes is None and self.bias is None:
            return mask if mask is None else torch.zeros((), dtype=dtype, device=device).masked_fill(~mask, -torch.inf)

        def compute() -> Tensor:
            columns = torch.arange(num_keys, device=device)
            added = self.distance_bias(_last(num_queries, num_keys, device), columns)
            return (added if mask is None else added.masked_fill(~mask, float("-inf"))).to(dtype)

        if self.bias is None:
            return self._keep("added", (num_queries, num_keys, device, dtype), compute)
        added = self.bias if self.slopes is None else self.bias + compute()
        return (added if mask is None else added.masked_fill(~mask, float("-inf"))).to(dtype)

    def document_starts(self) -> Tensor:
        """Return where documents begin in the rows laid end to end, and their length at last: [documents + 1] int32.

        It waits for the device.
        """
        assert self.segments is not None
        segments = self.segments

        def compute() -> Tensor:
            begins = _begins(segments).flatten().nonzero().squeeze(1)
            return torch.cat([begins, begins.new_tensor([segments.numel()])]).to(torch.int32)

        return self._keep("document_starts", (), compute)

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which keys the queries at these positions see: bool, [q, s] or [b, 1, q, s]."""
        distance = queries.unsqueeze(1) - keys
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance <= self.window)
        if self.segments is not None:
            same = self.segments[:, queries].unsqueeze(2) == self.segments[:, keys].unsqueeze(1)
            seen = seen & same.unsqueeze(1)
        if self.padding is not None:
            tokens = (keys >= self.padding.unsqueeze(1))[:, None, None]
            seen = seen & (tokens | (distance == 0))
        return seen

    def distance_bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the alibi bias of queries and keys at these positions, [n, q, s] fp32; without slopes one zero."""
        if self.slopes is None:
            return torch.zeros((), device=queries.device)
        distance = queries.unsqueeze(1) - keys
        return -self.slopes.to(queries.device).float().view(-1, 1, 1) * distance

    def _reach(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest position that tokens at these positions see, [b, q] each."""
        lowest = torch.zeros_like(positions) if self.window is None else (positions - self.window).clamp(min=0)
        lowest = lowest.unsqueeze(0)
        highest = positions.unsqueeze(0) if self.causal else torch.full_like(lowest, torch.iinfo(torch.int32).max)
        if self.segments is not None:
            starts, ends = _runs(self.segments)
            lowest = torch.maximum(lowest, starts[:, positions])
            highest = torch.minimum(highest, ends[:, positions])
        if self.padding is not None:
            lowest = torch.maximum(lowest, torch.minimum(positions, self.padding.unsqueeze(1)))
        return lowest.contiguous(), highest.expand_as(lowest).contiguous()

    def _keep(self, name: str, of: tuple[object, ...], compute: Callable[[], Kept]) -> Kept:
        """Return what `compute` says, which is asked again only where it is `of` something else than the last time."""
        if torch.compiler.is_compiling():  # a graph that kept something would differ from one that finds it
            return compute()
        if name not in self._kept or self._kept[name][0] != of:
            with torch.inference_mode(False):  # what is made while generating must serve training too
                self._kept[name] = (of, compute())
        kept: Kept = self._kept[name][1]
        return kept


def _last(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    return torch.arange(num_keys - num_queries, num_keys, device=device)


def _begins(segments: Tensor) -> Tensor:
    """Return which tokens are the first of a document, [b, s] bool; a row's first token always is."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins


def _runs(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the document of each token starts and ends, [b, s] int64, both within it."""
    length = segments.shape[1]
    columns = torch.arange(length, device=segments.device).expand_as(segments)
    starts_here = _begins(segments)
    starts = torch.where(starts_here, columns, 0).cummax(dim=1).values
    ends_here = starts_here.roll(-1, dims=1)  # the first token of a row starts a document, so its last one ends one
    ends = torch.where(ends_here, columns, length - 1).flip(1).cummin(dim=1).values.flip(1)
    return starts, ends
