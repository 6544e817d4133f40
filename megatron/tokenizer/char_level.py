"""CharLevelTokenizer: the UTF-8 bytes of the text are the ids. No file is needed.

As in GPT-NeoX the vocabulary has 512 entries, 0 ends documents and 1 pads. Unlike there, decoding gives the text back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer.backend import not_unicode
from megatron.tokenizer.base import FastBackend
from megatron.tokenizer.files import hash_of


class CharLevelTokenizer:
    """One id per byte of UTF-8."""

    name = "CharLevelTokenizer"
    vocab_size = 512
    eod = 0
    pad = 1

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise not_unicode(text) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of several documents."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of the bytes `ids`; ids of 256 and more stand for nothing."""
        kept = (int(token) for token in ids if token < 256 and not (skip_special and token in (self.eod, self.pad)))
        return bytes(kept).decode(errors="replace")

    def fingerprint(self) -> str:
        """A constant: there is only one such tokenizer."""
        return hash_of(self.name, self.vocab_size)

    def fast_backend(self) -> FastBackend:
        """The bytes as an array, without a Python object for each."""
        return _Bytes()


class _Bytes:
    vocab_size = 512
    library = "numpy"

    def encode(self, text: str) -> NDArray[Any]:
        """The bytes of `text`, u8 [bytes]."""
        return np.frombuffer(text.encode(), np.uint8)


def load_char_level(vocab_file: str | None = None, merge_file: str | None = None) -> CharLevelTokenizer:
    """The character-level tokenizer; it reads no file."""
    return CharLevelTokenizer()
