"""The training samples of one token file: `dataset.read(indices)` yields rows of seq_length + 1 tokens.

A batch is gathered at once: its samples become a list of pieces (a run of tokens of one document and its place in the
batch), and the pieces are copied from the memory map. Nothing is kept between reads, so threads may share a data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.documents import IGNORED, Documents
from megatron.data.indexed import IndexedDataset
from megatron.data.samples import SampleIndex
from megatron.errors import DataError, Problem

PADDING = 0
MEAN_PIECE_TO_SLICE = 128
"""Pieces longer than this on average are copied as slices, shorter ones by one gather (measured: 16k tokens of
documents of 400 take 15 us against 32 us; of documents of 10, 600 us against 40 us)."""


@dataclass(frozen=True)
class Samples:
    """text: [b, s + 1] int64 token ids. labels: [b, s + 1] int64, negative where ignored, or None: the text itself."""

    text: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Origin:
    """Where a sample was taken from: the token file's prefix, and the documents in it that it has tokens of."""

    prefix: str
    documents: list[int]


class SampleReader(Protocol):
    """Anything that yields samples by index: one data set, or a blend of several."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices` [b]; indices past the end wrap around."""
        ...

    def origins(self, indices: NDArray[np.int64]) -> list[Origin]:
        """Return where the samples at `indices` [b] were taken from."""
        ...


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens, all [p] int64: document (in the file), offset in it, length, place in the flat batch."""

    documents: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    places: NDArray[np.int64]

    def copy(self, source: IndexedDataset, target: NDArray[np.int64]) -> None:
        """Copy the pieces of `source` to their places in the flat `target`."""
        begins = source.pointers[self.documents] // source.dtype.itemsize + self.offsets
        source.will_need(begins.tolist(), self.lengths.tolist())
        if int(self.lengths.sum()) >= MEAN_PIECE_TO_SLICE * self.lengths.size:
            tokens = source.tokens
            for begin, length, place in zip(begins.tolist(), self.lengths.tolist(), self.places.tolist(), strict=True):
                target[place : place + length] = tokens[begin : begin + length]
            return
        steps = _within_runs(self.lengths)
        target[np.repeat(self.places, self.lengths) + steps] = source.tokens[np.repeat(begins, self.lengths) + steps]


class GptDataset:
    """Samples of seq_length + 1 tokens of `documents`, as `index` lays them out.

    vocab_size: ids from here on are an error, None checks nothing.
    neox_compat: as GPT-NeoX, train on the padding of samples without label files, and where a sample ends with the
    first token of an empty document, take the token that follows in the file.
    """

    def __init__(
        self,
        documents: Documents,
        index: SampleIndex,
        seq_length: int,
        vocab_size: int | None = None,
        neox_compat: bool = False,
    ) -> None:
        self.documents = documents
        self.index = index
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.neox_compat = neox_compat
        for source in (documents.text, documents.labels):
            if source is not None:
                source.expect_random_reads()

    def __len__(self) -> int:
        return len(self.index)

    def read(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices` [b]. Raises DataError for a token id beyond the vocabulary."""
        pieces = self._pieces(self.index.rows(indices))
        text = self._copy(pieces, self.documents.text, len(indices), PADDING)
        self._check_vocabulary(text, self.documents.text)
        if self.documents.labels is not None:
            labels = self._copy(pieces, self.documents.labels, len(indices), IGNORED)
            self._check_vocabulary(np.maximum(labels, 0), self.documents.labels)
            return Samples(text, labels)
        if self.neox_compat or int(pieces.lengths.sum()) == text.size:
            return Samples(text)
        return Samples(text, self._copy(pieces, self.documents.text, len(indices), IGNORED))

    def origins(self, indices: NDArray[np.int64]) -> list[Origin]:
        """Return where the samples at `indices` [b] were taken from."""
        prefix, width, found = self.documents.text.prefix, self.seq_length + 1, []
        pieces = self._pieces(self.index.rows(indices))
        for row in range(len(indices)):
            is_mine = (pieces.places // width == row) & (pieces.lengths > 0)
            found.append(Origin(prefix, pieces.documents[is_mine].tolist()))
        return found

    def _copy(self, pieces: Pieces, source: IndexedDataset, rows: int, padding: int) -> NDArray[np.int64]:
        flat = np.full(rows * (self.seq_length + 1), padding, np.int64)
        pieces.copy(source, flat)
        return flat.reshape(rows, self.seq_length + 1)

    def _pieces(self, rows: NDArray[np.int64]) -> Pieces:
        """Lay out the samples `rows`, each cut to seq_length + 1 tokens."""
        index, width = self.index, self.seq_length + 1
        first, last = index.positions[rows], index.positions[rows + 1]
        counts = last - first + 1
        sample = np.repeat(np.arange(rows.size), counts)
        step = _within_runs(counts)
        documents = index.documents[first[sample] + step].astype(np.int64) + self.documents.start
        ends = self.documents.text.sizes[documents].astype(np.int64)
        is_last = step == counts[sample] - 1
        limits = self._tokens_left(documents[is_last]) if self.neox_compat else ends[is_last]
        ends[is_last] = np.minimum(limits, index.offsets[rows + 1] + 1)
        offsets = np.where(step == 0, index.offsets[rows][sample], 0)
        lengths = ends - offsets
        places = np.cumsum(lengths) - lengths
        places -= places[np.cumsum(counts) - counts][sample]
        lengths = np.clip(lengths, 0, np.maximum(width - places, 0))
        return Pieces(documents, offsets, lengths, places + sample * width)

    def _tokens_left(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens from the beginning of each document to the end of the file."""
        text = self.documents.text
        return text.num_tokens - text.pointers[documents] // text.dtype.itemsize

    def _check_vocabulary(self, ids: NDArray[np.int64], source: IndexedDataset) -> None:
        """Negative ids are caught by the same comparison: as unsigned numbers they are huge."""
        if self.vocab_size is None or ids.view(np.uint64).max() < self.vocab_size:
            return
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        raise beyond_vocabulary(source.prefix, int(wrong[0]), self.vocab_size)


def beyond_vocabulary(prefix: str, token: int, vocab_size: int) -> DataError:
    """The error for a token id that the embedding has no row for."""
    return DataError(
        Problem(
            what=f"token id {token} in {prefix}.bin",
            why=f"the tokenizer's vocabulary has {vocab_size:,} entries, ids 0 to {vocab_size - 1}.",
            fix="Set tokenizer_type and vocab_file to the tokenizer that the data was built with, or build the data "
            "again with tools/preprocess_data.py.",
        )
    )


def _within_runs(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """0 .. n - 1 for every n of `lengths`, one after another: [2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)
