"""The size of a data set from its header alone: enough to say how many epochs a run is.

The reader of the data itself is `megatron/data/indexed.py`; this needs neither numpy nor the file's contents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from megatron.config.split import split_shares

_HEADER = struct.Struct("<9sQBQ")
_MAGIC = b"MMIDIDX\0\0"
_ITEM_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 4, 7: 8, 8: 2}


@dataclass(frozen=True)
class Corpus:
    """tokens: of the whole .bin file; documents: entries of the .idx file."""

    tokens: int
    documents: int


def read_corpus(prefix: str) -> Corpus | str:
    """Return the size of the data set `prefix`.bin and `prefix`.idx, or half a sentence saying why it is unknown."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (index, tokens):
        if not file.is_file():
            return f"{file} does not exist here"
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        return f"{index} is not an MMIDIDX index"
    _, _, code, documents = _HEADER.unpack(header)
    if code not in _ITEM_SIZE:
        return f"{index} has an unknown token type ({code})"
    return Corpus(tokens.stat().st_size // _ITEM_SIZE[code], documents)


def train_fraction(split: str) -> float:
    """Return the training share of a `split` such as "969, 30, 1" or "98/1/1"."""
    shares = split_shares(split)
    return shares[0] / sum(shares)
