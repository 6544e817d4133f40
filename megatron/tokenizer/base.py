"""What a tokenizer is to the rest of the library: text to ids, ids to text, and the two ids with a meaning.

The one idea: one protocol, several kinds. `build.py` chooses the kind; nobody else asks which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def name(self) -> str:
        """The kind as written in the YAML, such as `HFTokenizer`."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included, before padding for the model."""

    @property
    def eod(self) -> int:
        """The id that ends a document. Raises TokenizerError where the tokenizer has none."""

    @property
    def pad(self) -> int:
        """The id that fills unused positions; `eod` where the tokenizer has no padding token."""

    def encode(self, text: str) -> list[int]:
        """The ids of one document, without the end-of-document id. Raises TokenizerError for lone surrogates."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several documents, in parallel where the kind can."""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves out special tokens."""

    def fingerprint(self) -> str:
        """Sha256 in hex over what decides the ids: equal fingerprints give equal ids for every text."""


class FastBackend(Protocol):
    """A second implementation of the same tokenizer, for preprocessing: one document at a time, releasing the GIL."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    def encode(self, text: str) -> NDArray[Any]:
        """The ids of one document, u32 [tokens]."""


@runtime_checkable
class Accelerated(Protocol):
    """A tokenizer that knows a faster implementation of itself; `fast.py` verifies it before use."""

    def fast_backend(self) -> FastBackend:
        """Load it; raises whatever the library raises where it cannot."""
