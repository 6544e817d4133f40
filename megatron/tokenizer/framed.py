"""What a tokenizer does around the encoding itself, for fast backends: normalise before, put ids around it after.

The one idea of `Normalised`: most documents are in normal form already, which is quick to see, and the others are
normalised by the `tokenizers` library itself. Implementations of Unicode normalisation differ in the rarest characters
(gigatoken 0.10 and tokenizers 0.23 in 121 combining marks), so a second implementation must not be trusted with it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer.base import FastBackend

Form = Literal["NFC", "NFKC"]


def unicode_form(normalizer: dict[str, Any] | None) -> Form | None:
    """The Unicode normal form that a tokenizer.json's `normalizer` produces; None where it is anything else."""
    while normalizer is not None and normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) == 1:
        normalizer = normalizer["normalizers"][0]
    kind = normalizer.get("type") if normalizer else None
    return cast(Form, kind) if kind in ("NFC", "NFKC") else None


class Normalised:
    """A fast backend for text in normal form, for text of any kind.

    inner: encodes without normalising. form: the normal form. normalise: the reference implementation. special: texts
    of special tokens, which are found before normalising. slow: the reference for documents in which that matters.
    """

    def __init__(
        self,
        inner: FastBackend,
        form: Form,
        normalise: Callable[[str], str],
        special: Sequence[str],
        slow: Callable[[str], list[int]],
    ) -> None:
        self.inner = inner
        self.vocab_size = inner.vocab_size
        self.form = form
        self.normalise = normalise
        self.special = special
        self.slow = slow

    def encode(self, text: str) -> NDArray[Any]:
        """The ids of `text` after normalising it."""
        if text.isascii() or unicodedata.is_normalized(self.form, text):
            return self.inner.encode(text)
        normal = self.normalise(text)
        if any(token in text or token in normal for token in self.special):
            return np.array(self.slow(text), np.uint32)
        return self.inner.encode(normal)


class Framed:
    """A fast backend whose documents are wrapped in constant ids."""

    def __init__(self, inner: FastBackend, prefix: list[int], suffix: list[int]) -> None:
        self.inner = inner
        self.vocab_size = inner.vocab_size
        self.prefix = np.array(prefix, np.uint32)
        self.suffix = np.array(suffix, np.uint32)

    def encode(self, text: str) -> NDArray[Any]:
        """Prefix, the ids of the text, suffix."""
        return np.concatenate([self.prefix, self.inner.encode(text), self.suffix])
