"""Many documents to one array of ids, with gigatoken where it is proven to give the tokenizer's own ids.

The one idea: speed is only taken after a check. `choose_encoder` encodes a fixed set of awkward texts and a sample of
the documents with both implementations; one difference, or a tokenizer that gigatoken cannot load, and the tokenizer
itself is used, which `reason` says in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer.base import Accelerated, FastBackend, Tokenizer
from megatron.tokenizer.bounded import Bounded

AWKWARD_TEXTS = (
    "",
    " ",
    "\n",
    "a  b   c \n\n\t\td  \r\n e\u00a0f\u2003g\u3000",
    "I'll they've we're it's I'd don't I'm 'S 'LL",
    "x=1234567890; y=0xDEADBEEF; 3.14159e-10 ١٢٣ ⅷ ² ½",
    "naïve café coöperate \u0065\u0301 \u1e9b\u0323 ﬁ ﷺ Ⅷ ﾊﾝｶｸ",
    "日本語のテキスト 中文 한국어 ไทย हिन्दी עברית العربية Ελληνικά Русский",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 \U0001f9d1\U0001f3fd ☃️",
    "<|endoftext|> before<|endoftext|>after <|padding|> <|endoftext|",
    "</s> <s> <unk> [PAD] <|im_start|> <|begin_of_text|>",
    "def f(self, *args: int, **kwargs) -> None:\n    return {'a': [1, 2, 3][::-1]}  # !?$%&/()=\n",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\Users\\x\\n \\u0041",
    "\x00\x01\x1f\x7f\x80\x9f\u200b\u200d\u2028\u2029\ufeff\ufffd\ufffe\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----------------========________........                                !!!!!!!!",
)


@dataclass(frozen=True)
class DocumentEncoder:
    """Encodes batches of documents.

    tokenizer: the definition of the ids; fast: a verified second implementation, or None.
    reason: one line for a person, which implementation is used and why.
    """

    tokenizer: Tokenizer
    fast: FastBackend | None
    reason: str

    def encode(
        self, texts: Sequence[str], end: int | None, dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the ids of all `texts` as one array of `dtype`, and the number of ids of each, [documents].

        end: the id to append to each document; None appends nothing. `dtype` must hold every id of the vocabulary.
        """
        tail = [] if end is None else [np.array([end], np.uint32)]
        if self.fast is None:
            documents = [np.array(ids, np.uint32) for ids in self.tokenizer.encode_batch(texts)]
        else:
            encode = self.fast.encode
            documents = [encode(text) for text in texts]
        sizes = np.fromiter((ids.size for ids in documents), np.int64, len(documents)) + len(tail)
        pieces = [piece for ids in documents for piece in (ids, *tail)]
        if not pieces:
            return np.zeros(0, dtype), sizes
        return np.concatenate(pieces, dtype=dtype, casting="unsafe"), sizes


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str]) -> DocumentEncoder:
    """The fastest encoder whose ids equal the tokenizer's on AWKWARD_TEXTS and on `sample`."""
    if not isinstance(tokenizer, Accelerated):
        return DocumentEncoder(tokenizer, None, f"Encoding with {tokenizer.name}, which has no faster implementation.")
    try:
        fast = Bounded(tokenizer.fast_backend)
    except Exception as error:  # whatever the library raises means the same here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DocumentEncoder(tokenizer, None, f"Encoding with {tokenizer.name}: gigatoken cannot load it ({reason}).")
    for text in (*AWKWARD_TEXTS, *sample):
        if not _same(tokenizer, fast, text):
            reason = f"gigatoken gives other ids for {text[:40]!r}."
            return DocumentEncoder(tokenizer, None, f"Encoding with {tokenizer.name}: {reason}")
    characters = sum(len(text) for text in sample)
    checked = f"checked against {tokenizer.name} on {len(sample)} documents ({characters:,} characters), the same ids"
    library = getattr(fast.inner, "library", "gigatoken")
    return DocumentEncoder(tokenizer, fast, f"Encoding with {library}, {checked}.")


def _same(tokenizer: Tokenizer, fast: FastBackend, text: str) -> bool:
    try:
        return bool(fast.encode(text).tolist() == tokenizer.encode(text))
    except Exception:  # a text that only one of the two can encode is a difference
        return False
