"""A tokenizer on top of the `tokenizers` library; the three Hugging Face kinds are ways to load one.

`encode` adds what the file's own post-processor adds (Llama-3 puts its begin-of-text token first), because GPT-NeoX
does, and so that data sets stay byte-identical.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tokenizers

from megatron.tokenizer.base import FastBackend
from megatron.tokenizer.files import hash_of, tokenizer_error
from megatron.tokenizer.framed import Framed, Normalised, unicode_form
from megatron.tokenizer.special import KNOWN_ENDS, KNOWN_PADS, first_id, require_end

DECIDES_IDS = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
"""The parts of a tokenizer.json that the fingerprint covers; decoder, truncation, padding and version are not ids."""


class BackendTokenizer:
    """A `tokenizers.Tokenizer` behind our protocol.

    name: the kind; source: the path or name that messages show; backend: the loaded tokenizer.
    end, pad: texts of the special tokens that the tokenizer's own files name; None: look for the known ones.
    """

    def __init__(
        self, name: str, source: str, backend: tokenizers.Tokenizer, end: str | None = None, pad: str | None = None
    ) -> None:
        self.name = name
        self.source = source
        self.backend = backend
        self.vocab_size = number_of_ids(backend)
        backend.no_truncation()
        backend.no_padding()
        find = backend.token_to_id
        self._end = first_id(find, (KNOWN_ENDS[0], end, *KNOWN_ENDS[1:]))
        self._pad = first_id(find, (KNOWN_PADS[0], pad, *KNOWN_PADS[1:]))

    @property
    def eod(self) -> int:
        """`<|endoftext|>`, else the end token that the tokenizer's files name, else a well-known one."""
        return require_end(self._end, self.source)

    @property
    def pad(self) -> int:
        """`<|padding|>`, else the padding token that the tokenizer's files name, else `eod`."""
        return self.eod if self._pad is None else self._pad

    def encode(self, text: str) -> list[int]:
        """The ids of one document."""
        try:
            ids: list[int] = self.backend.encode(text).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise not_unicode(text) from error
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several documents, on all cores."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts))
        except (TypeError, UnicodeEncodeError):
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`."""
        text: str = self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special)
        return text

    def fingerprint(self) -> str:
        """Sha256 over the parts of the tokenizer.json that decide ids."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        description: dict[str, Any] = json.loads(self.backend.to_str())
        return hash_of(*(description.get(part) for part in DECIDES_IDS))

    def fast_backend(self) -> FastBackend:
        """The same tokenizer in gigatoken, between its own normaliser and the ids of its post-processor."""
        import gigatoken

        description: dict[str, Any] = json.loads(self.backend.to_str())
        form = unicode_form(description.get("normalizer"))
        if form is not None:
            description["normalizer"] = None
        fast: FastBackend = gigatoken.Tokenizer.from_json(json.dumps(description))._backend
        if form is not None:
            special = [token["content"] for token in description.get("added_tokens", [])]
            normalise = self.backend.normalizer.normalize_str
            fast = Normalised(fast, form, normalise, special, self._bare)
        prefix, suffix = self._frame()
        return Framed(fast, prefix, suffix) if prefix or suffix else fast

    def _bare(self, text: str) -> list[int]:
        """The ids of `text` without what the post-processor puts around them."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor adds before and after every document."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ValueError("the post-processor changes the ids of the text itself")


def number_of_ids(backend: tokenizers.Tokenizer) -> int:
    """The number of entries, as GPT-NeoX counts; one more than the largest id where some ids are left out."""
    entries: int = backend.get_vocab_size(with_added_tokens=True)
    added = max(backend.get_added_tokens_decoder(), default=-1) + 1
    if added <= entries and (entries == 0 or backend.id_to_token(entries - 1) is not None):
        return entries
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def not_unicode(text: str) -> Exception:
    """The error for text with half of a surrogate pair, which no encoding can store."""
    place = next((index for index, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), 0)
    return tokenizer_error(
        f"character {place} of the text",
        f"is {text[place : place + 1]!r}, half of a surrogate pair, which is not Unicode text.",
        "Mend the text where it is produced: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').",
    )
