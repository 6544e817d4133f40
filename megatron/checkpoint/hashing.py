"""Hashes of fixed-size blocks, so that whoever reads a part proves just that part.

A range of bytes is cut into blocks of `block` bytes, the last one shorter, and its proof is their hashes, joined. The
hash finds damage (a flipped bit, a torn write, another file), it is no defence against forgery: xxh3 with 128 bits
takes 20 GB/s of one core, where sha256 takes 1.8. Checkpoints of version 1 have one sha256 for each range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import xxhash

Bytes = bytes | bytearray | memoryview
MEBIBYTE = 1 << 20
_FUNCTIONS: dict[str, Callable[[Bytes], str]] = {
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "xxh3_128": lambda data: xxhash.xxh3_128_hexdigest(data),
}
_DIGITS = {"sha256": 64, "xxh3_128": 32}


@dataclass(frozen=True)
class Hashing:
    """How a checkpoint's ranges are hashed. name: "xxh3_128" or "sha256". block: bytes; 0 hashes a range whole."""

    name: str
    block: int

    @property
    def is_known(self) -> bool:
        """Whether this installation can compute it."""
        return self.name in _FUNCTIONS

    def hash(self, data: Bytes) -> str:
        """Return the hash of one block, or of a header, as hexadecimal digits."""
        return _FUNCTIONS[self.name](data)

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each block of a range of `size` bytes; none of an empty one, unless hashed whole."""
        if not self.block:
            yield 0, size
            return
        for start in range(0, size, self.block):
            yield start, min(start + self.block, size)

    def around(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """Return the smallest run of whole blocks of a range of `size` bytes that holds bytes [start, stop)."""
        if not self.block:
            return 0, size
        return start - start % self.block, min(size, stop + -stop % self.block)

    def proof(self, data: Bytes) -> str:
        """Return the proof of a whole range that is in memory."""
        view = memoryview(data)
        return "".join(self.hash(view[start:stop]) for start, stop in self.blocks(len(view)))

    def wrong_block(self, data: Bytes, proof: str, first: int = 0) -> int | None:
        """Compare `data` with its part of a range's proof; return the number of the first block that differs, or None.

        data: whole blocks, of which the first is number `first` of the range.
        """
        view, digits = memoryview(data), _DIGITS[self.name]
        for number, (start, stop) in enumerate(self.blocks(len(view)), first):
            if self.hash(view[start:stop]) != proof[number * digits : (number + 1) * digits]:
                return number
        return None


CURRENT = Hashing("xxh3_128", MEBIBYTE)
VERSION_1 = Hashing("sha256", 0)
