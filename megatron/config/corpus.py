"""The size of a data set from the ends of its two files: enough to say how many epochs a run is, and what is broken.

The reader of the data itself is `megatron/data/indexed.py`; this needs neither numpy nor the files' contents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron.config.split import split_shares
from megatron.errors import Problem

_HEADER = struct.Struct("<9sQBQQ")
_SIZE, _POINTER = struct.Struct("<i"), struct.Struct("<q")
_MAGIC, _LEGACY = b"MMIDIDX\0\0", b"TNTIDX\0\0"
# Bytes of a token by its code; Megatron-LM swaps 6 and 7, which the length of the .bin tells apart.
_ITEM_SIZES = {1: (1,), 2: (1,), 3: (2,), 4: (4,), 5: (8,), 6: (4, 8), 7: (8, 4), 8: (2,)}
_REBUILD = "Copy both files again, or build them with tools/preprocess_data.py."


@dataclass(frozen=True)
class Corpus:
    """tokens: of the whole .bin file; documents: entries of the .idx file."""

    tokens: int
    documents: int


class _BrokenError(Exception):
    """Why a data set cannot be what its header says."""


def absent_files(prefix: str) -> list[Path]:
    """Return which of `prefix`.bin and `prefix`.idx are not here."""
    return [file for file in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) if not file.is_file()]


def read_corpus(prefix: str, key: str = "data_path") -> Corpus | Problem:
    """Return the size of a data set whose two files are here, or why they cannot be used.

    key: the setting that names the prefix. What is compared: the length of the .idx with the counts in its header, and
    the length of the .bin with the end of the last document."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with index.open("rb") as stream:
            item_sizes, documents = _read_header(stream, index)
            start, last = _last_document(stream, documents)
    except OSError as error:
        return Problem(f"{key} = {prefix}", f"{index} cannot be read ({error.strerror}).", "Make it readable.")
    except _BrokenError as error:
        return Problem(f"{key} = {prefix}", str(error), _REBUILD)
    length = tokens.stat().st_size
    for item_size in item_sizes:
        if start + last * item_size == length:
            return Corpus(length // item_size, documents)
    expected = start + last * item_sizes[0]
    kind = "is truncated" if length < expected else "is of another data set"
    why = f"{tokens} {kind}: {length:,} bytes, but {index.name} lists documents of {expected:,} bytes."
    return Problem(f"{key} = {prefix}", why, _REBUILD)


def _read_header(stream: BinaryIO, index: Path) -> tuple[tuple[int, ...], int]:
    """Return (possible bytes of a token, number of documents); the length of the file is that of its counts."""
    header = stream.read(_HEADER.size)
    if header.startswith(_LEGACY):
        raise _BrokenError(f'{index} is in the legacy TNTIDX format (data_impl "cached"), and is not an MMIDIDX index.')
    if not header.startswith(_MAGIC):
        raise _BrokenError(f"{index} is not an MMIDIDX index.")
    if len(header) < _HEADER.size:
        raise _BrokenError(f"{index} is truncated within its header ({len(header)} bytes).")
    _, version, code, documents, bounds = _HEADER.unpack(header)
    if version != 1 or code not in _ITEM_SIZES:
        raise _BrokenError(f"{index} has version {version} and token type {code}; known are version 1, types 1 to 8.")
    expected, found = _HEADER.size + 12 * documents + 8 * bounds, index.stat().st_size
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise _BrokenError(f"{index} is {kind}: {found:,} bytes, but its {documents:,} documents need {expected:,}.")
    return _ITEM_SIZES[code], documents


def _last_document(stream: BinaryIO, documents: int) -> tuple[int, int]:
    """Return (first byte, number of tokens) of the last document."""
    if documents == 0:
        return 0, 0
    stream.seek(_HEADER.size + _SIZE.size * (documents - 1))
    tokens = _SIZE.unpack(stream.read(_SIZE.size))[0]
    stream.seek(_HEADER.size + _SIZE.size * documents + _POINTER.size * (documents - 1))
    return _POINTER.unpack(stream.read(_POINTER.size))[0], tokens


def train_fraction(split: str) -> float:
    """Return the training share of a `split` such as "969, 30, 1" or "98/1/1"."""
    shares = split_shares(split)
    return shares[0] / sum(shares)
