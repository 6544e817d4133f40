"""Token files in the MMIDIDX format: `<prefix>.bin` (tokens, nothing else) and `<prefix>.idx` (where documents lie).

The one idea: both files are mapped into memory, never read, so a corpus of terabytes opens in milliseconds and each
document is a view of the map. All numbers are little-endian:

    .idx    9 bytes   "MMIDIDX\\0\\0"
            u64       version, 1
            u8        dtype code (DTYPE_CODES)
            u64       N, the number of items (one per document)
            u64       D, the number of doc_idx entries
            i32[N]    sizes: tokens per item
            i64[N]    pointers: byte offset of each item in .bin (the exclusive sum of sizes times the item size)
            i64[D]    doc_idx: the item at which each document starts, then N
    .bin    the items one after another

The 64-bit arrays are not aligned to 8 bytes; numpy reads them through unaligned views.

Use: `dataset = IndexedDataset("data/corpus_text_document"); dataset[7]`, and `with IndexedWriter(prefix, np.uint16) as
writer: writer.add_document(ids)`. Nothing appears under the final names before the writer is closed without an error.

Source: the format of Megatron-LM and GPT-NeoX; the bytes written are the same as theirs.
"""

from __future__ import annotations

import difflib
import errno
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.data.leftovers import remove_leftovers, temporary_name
from megatron.errors import DataError, Problem

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f4"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
"""GPT-NeoX's codes. Megatron-LM swaps 6 and 7; the reader tells them apart by the length of the .bin."""

MEGATRON_LM_CODES = {6: DTYPE_CODES[7], 7: DTYPE_CODES[6]}
REBUILD = "Build it again with tools/preprocess_data.py."


def token_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The dtype GPT-NeoX stores tokens in: 2 bytes below a vocabulary of 65,500 entries, else 4 (None: unknown)."""
    return DTYPE_CODES[8] if vocab_size is not None and vocab_size < 65500 else DTYPE_CODES[4]


def bin_path(prefix: str | Path) -> Path:
    """The file with the tokens of `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file with the sizes and offsets of `prefix`."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The documents of one token file, read in O(1) through memory maps.

    prefix: the path of the two files without `.bin` and `.idx`.
    warmup: read both files once at the start, so that later reads come from the page cache.

    `sizes` (i32 [N], tokens), `pointers` (i64 [N], bytes) and `doc_idx` (i64 [D]) are views of the map. Instances can
    be pickled: a worker process opens the files anew. Raises DataError for files that are missing, truncated,
    inconsistent or of another format.
    """

    def __init__(self, prefix: str | Path, warmup: bool = False) -> None:
        self.prefix = str(prefix)
        _check_presence(self.prefix)
        index = _map(idx_path(prefix))
        self._bytes = _map(bin_path(prefix))
        code, num_items, num_bounds = _read_header(idx_path(prefix), index)
        first = HEADER.size
        self.sizes: NDArray[np.int32] = np.frombuffer(index, "<i4", num_items, first)
        self.pointers: NDArray[np.int64] = np.frombuffer(index, "<i8", num_items, first + 4 * num_items)
        self.doc_idx: NDArray[np.int64] = np.frombuffer(index, "<i8", num_bounds, first + 12 * num_items)
        self.num_tokens = int(self.sizes.sum(dtype=np.int64))
        self.dtype = _resolve_dtype(code, self.num_tokens, self._bytes.size)
        self._check()
        if warmup:
            self._bytes[:: os.sysconf("SC_PAGE_SIZE")].sum()

    def __len__(self) -> int:
        return self.sizes.size

    def __getitem__(self, index: int) -> NDArray[Any]:
        """The tokens of item `index`, a read-only view in the file's dtype."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {self.prefix}, which has {len(self)} items")
        return np.frombuffer(self._bytes, self.dtype, self.sizes[index], self.pointers[index])

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """`length` tokens of item `index` from token `offset` on (None: to its end), a read-only view."""
        item = self[index]
        return item[offset : item.size if length is None else offset + length]

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens of the file one after another, a read-only view [num_tokens]; item i begins at its pointer."""
        return np.frombuffer(self._bytes, self.dtype, self.num_tokens)

    def expect_random_reads(self) -> None:
        """Tell the kernel that documents are read in random order, so that it reads no more than is asked for.

        Its read-ahead (8 MB on some machines) otherwise costs 2.2 ms per document on a cold SSD instead of 0.13 ms.
        """
        self._advise("MADV_RANDOM", [(0, self._bytes.size)])

    def will_need(self, begins: list[int], lengths: list[int]) -> None:
        """Start reading the token ranges from `begins` on, all at once: 0.02 ms per document on a cold SSD."""
        size, page = self.dtype.itemsize, mmap.PAGESIZE
        starts = [begin * size // page * page for begin in begins]
        ends = [(begin + length) * size for begin, length in zip(begins, lengths, strict=True)]
        self._advise("MADV_WILLNEED", list(zip(starts, ends, strict=True)))

    def _advise(self, advice: str, byte_ranges: list[tuple[int, int]]) -> None:
        """Advice is a help, not a need: an empty file has no map, and some systems know no advice."""
        base, option = self._bytes.base, getattr(mmap, advice, None)
        if isinstance(base, mmap.mmap) and option is not None:
            for start, end in byte_ranges:
                base.madvise(option, start, end - start)

    @property
    def num_documents(self) -> int:
        """The number of items, which is what training calls documents."""
        return len(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]

    def _check(self) -> None:
        """Sizes, pointers and the length of the .bin must agree, or reads would return other documents."""
        expected, found = self.num_tokens * self.dtype.itemsize, self._bytes.size
        if found < expected:
            raise _data_error(
                bin_path(self.prefix),
                f"is truncated: {found:,} bytes, but the .idx lists {self.num_tokens:,} tokens of "
                f"{self.dtype.itemsize} bytes = {expected:,} bytes.",
                f"Copy the file again, or rebuild it. {REBUILD}",
            )
        if found > expected:
            raise _data_error(
                bin_path(self.prefix),
                f"has {found:,} bytes, but the sizes in the .idx sum to {self.num_tokens:,} tokens = {expected:,}.",
                f"The .bin and the .idx are not from the same run. {REBUILD}",
            )
        last_end = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if len(self) else 0
        if last_end != expected or (len(self) and (self.sizes.min() < 0 or self.pointers[0] != 0)):
            raise _data_error(
                idx_path(self.prefix), "has sizes and offsets that contradict each other.", f"It is damaged. {REBUILD}"
            )


class IndexedWriter:
    """Writes a token file; the final names appear, complete and synced, only when `close` is reached.

    prefix: the path of the two files without suffix; the folder is created.
    dtype: what the tokens are stored in, one of DTYPE_CODES; `token_dtype(vocab_size)` is GPT-NeoX's choice.

    As a context manager it closes on success and removes its temporary files on an exception. Memory: 4 bytes per item
    and 8 per document. Raises DataError where a token does not fit the dtype or the disk is full.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, known in DTYPE_CODES.items() if known == self.dtype)
        self._sizes: list[NDArray[np.int32]] = []
        self._bounds: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self.num_items = 0
        self.num_tokens = 0
        self._temporary = [temporary_name(path) for path in (bin_path(prefix), idx_path(prefix))]
        try:
            bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(bin_path(prefix), idx_path(prefix))
            self._file: BinaryIO = open(self._temporary[0], "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _disk_error(bin_path(prefix), error) from error

    def add_item(self, tokens: NDArray[Any] | list[int]) -> None:
        """Append one item of the document under construction."""
        self._append(np.asarray(tokens), np.array([len(tokens)], np.int32))

    def end_document(self) -> None:
        """Mark the end of a document; a document without items is allowed."""
        self._bounds.append(np.array([self.num_items], np.int64))

    def add_document(self, tokens: NDArray[Any] | list[int]) -> None:
        """Append a document of one item."""
        self.add_item(tokens)
        self.end_document()

    def add_documents(self, tokens: NDArray[Any], sizes: NDArray[Any]) -> None:
        """Append many documents at once: `tokens` [sum of sizes] in document order, `sizes` [documents] in tokens.

        A document of size 0 leaves no item, only its entry in doc_idx, as in GPT-NeoX's tool.
        """
        filled = sizes > 0
        self._append(tokens, sizes[filled].astype(np.int32))
        first = self.num_items - int(filled.sum())
        self._bounds.append(first + np.cumsum(filled, dtype=np.int64))

    def close(self) -> None:
        """Write the index, sync both files and give them their final names; the .idx comes last."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            with open(self._temporary[1], "wb") as file:
                self._write_index(file)
                file.flush()
                os.fsync(file.fileno())
            idx_path(self.prefix).unlink(missing_ok=True)  # a new .bin must never stand beside an old .idx
            os.replace(self._temporary[0], bin_path(self.prefix))
            os.replace(self._temporary[1], idx_path(self.prefix))
            _sync_folder(bin_path(self.prefix).parent)
        except OSError as error:
            self.abort()
            raise _disk_error(bin_path(self.prefix), error) from error

    def abort(self) -> None:
        """Give up: nothing of this writer stays on disk."""
        self._file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _append(self, tokens: NDArray[Any], sizes: NDArray[np.int32]) -> None:
        stored = _fit(tokens, self.dtype, self.prefix)
        try:
            _write_all(self._file, memoryview(stored.view(np.uint8).data))
        except OSError as error:
            raise _disk_error(bin_path(self.prefix), error) from error
        self._sizes.append(sizes)
        self.num_items += sizes.size
        self.num_tokens += stored.size

    def _write_index(self, file: BinaryIO) -> None:
        sizes = np.concatenate([np.zeros(0, np.int32), *self._sizes]).astype("<i4")
        bounds = np.concatenate(self._bounds).astype("<i8")
        pointers = np.zeros(sizes.size, "<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, 1, self._code, sizes.size, bounds.size))
        for array in (sizes, pointers, bounds):
            file.write(array.data)


def _fit(tokens: NDArray[Any], dtype: np.dtype[Any], prefix: str) -> NDArray[Any]:
    """`tokens` in the dtype of the file; an integer that does not fit is an error, never wrapped."""
    if tokens.dtype != dtype and dtype.kind in "iu" and tokens.size:
        limits, low, high = np.iinfo(dtype), tokens.min(), tokens.max()
        if low < limits.min or high > limits.max:
            raise DataError(
                Problem(
                    what=f"token id {high if high > limits.max else low}",
                    why=f"does not fit the dtype {dtype} ({limits.min} to {limits.max}) of {prefix}.bin.",
                    fix="Choose the dtype from the tokenizer's vocabulary size: token_dtype(vocab_size).",
                )
            )
    return np.ascontiguousarray(tokens, dtype)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered write may take less than it is given (Linux stops at 2 GiB)."""
    while data:
        data = data[file.write(data) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _map(path: Path) -> NDArray[np.uint8]:
    """The bytes of `path`, mapped; an empty file cannot be mapped and is an empty array."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "r")


def _read_header(path: Path, index: NDArray[np.uint8]) -> tuple[int, int, int]:
    """The dtype code, number of items and number of doc_idx entries, with the file's length checked against them."""
    if bytes(index[: len(LEGACY_MAGIC)]) == LEGACY_MAGIC:
        raise _data_error(
            path,
            'is in the legacy TNTIDX format (data_impl "cached"), which cannot be used for training.',
            f"Convert it to MMIDIDX. {REBUILD}",
        )
    if bytes(index[: len(MAGIC)]) != MAGIC:
        raise _data_error(
            path, f"is not a token index: it begins with {bytes(index[:9])!r} instead of {MAGIC!r}.", REBUILD
        )
    if index.size < HEADER.size:
        raise _data_error(path, f"is truncated within its header ({index.size} bytes).", REBUILD)
    _, version, code, num_items, num_bounds = HEADER.unpack(bytes(index[: HEADER.size]))
    if version != 1 or code not in DTYPE_CODES:
        raise _data_error(
            path, f"has version {version} and dtype code {code}; known are version 1, codes 1 to 8.", REBUILD
        )
    expected = HEADER.size + 12 * num_items + 8 * num_bounds
    if index.size != expected:
        kind = "truncated" if index.size < expected else "too long"
        raise _data_error(
            path,
            f"is {kind}: {index.size:,} bytes, but {num_items:,} items need {expected:,}.",
            f"Copy it again. {REBUILD}",
        )
    return code, num_items, num_bounds


def _resolve_dtype(code: int, num_tokens: int, num_bytes: int) -> np.dtype[Any]:
    """GPT-NeoX's dtype of `code`, or Megatron-LM's where only that one agrees with the length of the .bin."""
    other = MEGATRON_LM_CODES.get(code)
    if other is not None and num_tokens * other.itemsize == num_bytes:
        return other
    return DTYPE_CODES[code]


def _check_presence(prefix: str) -> None:
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if not missing:
        return
    stem = prefix[:-4] if prefix.endswith((".bin", ".idx")) else ""
    if stem and bin_path(stem).is_file():
        raise _data_error(Path(prefix), "is one file of a pair.", f"Write the path without its suffix: {stem}")
    if len(missing) == 1:
        there = bin_path(prefix) if missing[0] == idx_path(prefix) else idx_path(prefix)
        raise _data_error(
            missing[0], f"does not exist, though {there.name} does.", f"Copy it too, or rebuild it. {REBUILD}"
        )
    raise _data_error(Path(prefix), f"there is no {missing[0].name} and no {missing[1].name}.", _suggest(prefix))


def _suggest(prefix: str) -> str:
    """What the user may have meant: prefixes beside the missing one, those that begin like it first."""
    path = Path(prefix)
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    stems = sorted(found.stem for found in path.parent.glob("*.idx"))
    near = [stem for stem in stems if stem.startswith(path.name)]
    near += [stem for stem in difflib.get_close_matches(path.name, stems, 4, 0.4) if stem not in near]
    if near:
        return f"Did you mean {' or '.join(str(path.parent / stem) for stem in near[:4])}?"
    if stems:
        return f"The folder holds {', '.join(stems[:8])}."
    return "The folder holds no token files. Build one with tools/preprocess_data.py."


def _data_error(path: Path, why: str, fix: str) -> DataError:
    return DataError(Problem(what=str(path), why=why, fix=fix))


def _disk_error(path: Path, error: OSError) -> DataError:
    fix = (
        "Free some space or write elsewhere." if error.errno == errno.ENOSPC else "Check the disk and its permissions."
    )
    return _data_error(path, f"could not be written: {error.strerror or error}.", f"{fix} No file was left behind.")
