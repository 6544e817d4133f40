"""A range of the documents of one token file, beside the labels that belong to them.

Everything that selects or packs documents works on `Documents`; document numbers in it count from 0 at its `start`,
so an index over a range never sees the documents of another part.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedDataset, bin_path
from megatron.errors import DataError, Problem

IGNORED = -100
"""The label of a token that is not trained on; any negative label counts as ignored."""

CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True)
class Documents:
    """Documents [start, stop) of `text`; `labels`, if given, is a file with as many tokens in every document."""

    text: IndexedDataset
    labels: IndexedDataset | None
    start: int
    stop: int

    @classmethod
    def whole(cls, text: IndexedDataset, labels: IndexedDataset | None = None) -> Documents:
        """All documents of a file. Raises DataError where the labels are not parallel to the text."""
        if labels is not None and not np.array_equal(text.sizes, labels.sizes):
            raise DataError(_not_parallel(text, labels))
        return cls(text, labels, 0, len(text))

    def part(self, start: int, stop: int) -> Documents:
        """The documents [start, stop) of these."""
        return Documents(self.text, self.labels, self.start + start, self.start + stop)

    def from_first(self) -> Documents:
        """As many documents, taken from the beginning of the file: what GPT-NeoX reads when it does not pack."""
        return Documents(self.text, self.labels, 0, len(self))

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in the range."""
        return int(self.text.sizes[self.start : self.stop].sum(dtype=np.int64))

    def sizes(self) -> NDArray[np.int32]:
        """Tokens per document, int32 [documents], copied so that it is aligned (4 bytes per document)."""
        return np.array(self.text.sizes[self.start : self.stop], dtype=np.int32)

    def digest(self) -> str:
        """A sha256 over all that an index of these documents depends on: their sizes and, if present, their labels.

        Labels count by the length and the modification time of their file.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.text.sizes[self.start : self.stop]).data)
        if self.labels is not None:
            status = os.stat(bin_path(self.labels.prefix))
            digest.update(f"labels {self.start} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def has_target(self, num_tokens: int) -> NDArray[np.bool_]:
        """Return bool [documents]: whether any of a document's first `num_tokens` labels is not IGNORED."""
        assert self.labels is not None
        found = np.empty(len(self), np.bool_)
        sizes = self.sizes()
        for begin, end in _chunks(sizes, CHUNK_TOKENS):
            lengths = sizes[begin:end].astype(np.int64)
            starts = np.cumsum(lengths) - lengths
            first = int(self.labels.pointers[self.start + begin]) // self.labels.dtype.itemsize
            kept = self.labels.tokens[first : first + int(lengths.sum())] != IGNORED
            counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
            found[begin:end] = counts[starts + np.minimum(lengths, num_tokens)] > counts[starts]
        return found


def _chunks(sizes: NDArray[np.int32], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive documents with about `limit` tokens each, at least one document."""
    ends = np.cumsum(sizes, dtype=np.int64)
    begin = 0
    while begin < sizes.size:
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + limit, "right")))
        yield begin, end
        begin = end


def _not_parallel(text: IndexedDataset, labels: IndexedDataset) -> Problem:
    if len(text) != len(labels):
        why = f"{len(labels):,} documents, but {text.prefix} has {len(text):,}."
    else:
        number = int(np.flatnonzero(text.sizes != labels.sizes)[0])
        counts = f"{labels.sizes[number]:,} labels, but {text.sizes[number]:,} tokens"
        why = f"document {number} has {counts} in {text.prefix}."
    return Problem(
        what=f"labels {labels.prefix}",
        why=why,
        fix="Name the label file that was written together with this text, in the same position of the list.",
    )
