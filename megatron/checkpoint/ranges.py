"""Where the elements of a wanted share lie in stored ones: numbers alone, without data.

A share on the tensor axis takes the same columns of each row, if the full tensor is seen as [rows, columns]:

    rows = (all dims before the split one) x blocks,    columns = one block of that dim x (all dims after it)

So a flat range of one of T shares is, in each of the S stored shares that it meets, one run of columns in each of
consecutive rows. Where T = S, and where there is one row only, that is one contiguous run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.parallel.sharding import ShardSpec


@dataclass(frozen=True)
class Columns:
    """The columns that a wanted and a stored share have in common, alike in all rows.

    rank: the stored share. length: of the common columns.
    stored_first, wanted_first: where they begin in a row of each share; stored_width, wanted_width: of such a row.
    """

    rank: int
    length: int
    stored_first: int
    stored_width: int
    wanted_first: int
    wanted_width: int

    def clipped(self, row: int, start: int, stop: int) -> tuple[int, int, int] | None:
        """Return (first stored, first wanted, length) of a row within elements [start, stop) of the wanted share."""
        begin = row * self.wanted_width + self.wanted_first
        first, last = max(start, begin), min(stop, begin + self.length)
        if first >= last:
            return None
        return row * self.stored_width + self.stored_first + first - begin, first, last - first

    def whole_rows(self, start: int, stop: int) -> range:
        """Return the rows all of whose common columns lie within elements [start, stop) of the wanted share."""
        first = -(-(start - self.wanted_first) // self.wanted_width)
        last = (stop - self.wanted_first - self.length) // self.wanted_width
        return range(max(0, first), last + 1)

    def cut_rows(self, start: int, stop: int) -> list[int]:
        """Return the rows of which [start, stop) may hold a part of the common columns: at most two."""
        whole = self.whole_rows(start, stop)
        return sorted(
            {row for row in (start // self.wanted_width, (stop - 1) // self.wanted_width) if row not in whole}
        )


def common_columns(
    shape: Sequence[int], spec: ShardSpec, wanted: tuple[int, int], stored_size: int
) -> Iterator[Columns]:
    """Yield the columns that the share `wanted` (rank, size) has in each stored share that it meets.

    shape: of the full tensor. stored_size: over how many shares it is stored.
    """
    rank, size = wanted if spec.dim is not None else (0, 1)
    numel = math.prod(shape)
    if spec.dim is None or size == stored_size:
        yield Columns(rank, numel // size, 0, numel // size, 0, numel // size)
        return
    rows = math.prod(shape[: spec.dim]) * spec.blocks
    width = numel // rows
    wanted_width, stored_width = width // size, width // stored_size
    for stored in range(stored_size):
        first = max(rank * wanted_width, stored * stored_width)
        last = min((rank + 1) * wanted_width, (stored + 1) * stored_width)
        if first < last:
            yield Columns(
                rank=stored,
                length=last - first,
                stored_first=first - stored * stored_width,
                stored_width=stored_width,
                wanted_first=first - rank * wanted_width,
                wanted_width=wanted_width,
            )
