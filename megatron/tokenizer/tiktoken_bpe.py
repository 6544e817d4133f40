"""TiktokenTokenizer: an encoding of OpenAI's tiktoken by its name, or its `.tiktoken` file of ranks.

A name such as `cl100k_base` is taken from tiktoken's cache (TIKTOKEN_CACHE_DIR) or downloaded; the path of a rank file
named after its encoding (`cl100k_base.tiktoken`) needs no network. Special tokens in the text are ordinary text.
"""

from __future__ import annotations

import hashlib
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.tokenizer.backend import not_unicode
from megatron.tokenizer.base import FastBackend
from megatron.tokenizer.files import tokenizer_error

KIND = "TiktokenTokenizer"


@dataclass(frozen=True)
class Encoding:
    """What a file of ranks does not say: the expression that splits the text, and the special tokens."""

    pattern: str
    special: dict[str, int]


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

RANK_FILES = {
    "r50k_base": Encoding(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": Encoding(
        _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}
"""The encodings that OpenAI publishes as rank files, by the name of the file."""

SPLITTERS = {"gpt2": "gpt2", "r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
"""Encodings whose splitting expression gigatoken has, with its name there; the others are encoded by tiktoken."""


class TiktokenTokenizer:
    """A tiktoken encoding; its `<|endoftext|>` ends documents and pads."""

    name = KIND

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.vocab_size = int(encoding.n_vocab)

    @property
    def eod(self) -> int:
        """The encoding's `<|endoftext|>`."""
        return int(self._encoding.eot_token)

    @property
    def pad(self) -> int:
        """tiktoken has no padding token: `eod`."""
        return self.eod

    def encode(self, text: str) -> list[int]:
        """The ids of one document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several documents."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise not_unicode(text) from error
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`."""
        special = set(self._encoding._special_tokens.values()) if skip_special else ()
        text: str = self._encoding.decode([int(token) for token in ids if token not in special])
        return text

    def fingerprint(self) -> str:
        """Sha256 over the ranks, the splitting expression and the special tokens."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(
            repr((self._encoding._pat_str, sorted(self._encoding._special_tokens.items()))).encode()
        )
        for piece, rank in sorted(self._encoding._mergeable_ranks.items()):
            digest.update(b"%d:%b\0" % (rank, piece))
        return digest.hexdigest()

    def fast_backend(self) -> FastBackend:
        """The same ranks in gigatoken, which reads them from a file; without special tokens, as `encode` does."""
        import gigatoken

        splitter = SPLITTERS.get(self._encoding.name)
        if splitter is None:
            raise ValueError(f"gigatoken has no splitting expression for {self._encoding.name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(
                b"".join(b"%b %d\n" % (b64encode(k), v) for k, v in self._encoding._mergeable_ranks.items())
            )
            fast: FastBackend = gigatoken.Tokenizer.from_tiktoken(path, splitter, {})._backend
        return fast


def load_tiktoken(vocab_file: str | None, merge_file: str | None = None) -> TiktokenTokenizer:
    """The encoding named `vocab_file`, or the one in the rank file at that path."""
    try:
        import tiktoken
    except ImportError as error:
        fix = "pip install tiktoken"
        raise tokenizer_error(f"tokenizer_type = {KIND}", "needs tiktoken, which is not installed.", fix) from error
    names = ", ".join(tiktoken.list_encoding_names())
    if vocab_file is None:
        raise tokenizer_error(
            "vocab_file is not set", f"{KIND} needs an encoding's name.", f"Set it to one of {names}."
        )
    if vocab_file.endswith(".tiktoken") or Path(vocab_file).is_file():
        return TiktokenTokenizer(_from_ranks(Path(vocab_file), names))
    if vocab_file not in tiktoken.list_encoding_names():
        raise tokenizer_error(
            f"vocab_file = {vocab_file}", "is no encoding of tiktoken and no file.", f"Known: {names}."
        )
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(vocab_file))
    except Exception as error:  # requests' family of errors, and tiktoken's own for a broken cache
        raise tokenizer_error(
            f"vocab_file = {vocab_file}",
            f"could not be downloaded ({type(error).__name__}), and is not in tiktoken's cache.",
            f"Copy {vocab_file}.tiktoken from a machine with network and set vocab_file to its path.",
        ) from error


def _from_ranks(path: Path, names: str) -> Any:
    """The encoding whose ranks are in `path`; the file's name says which expression and special tokens go with them."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    if not path.is_file():
        raise tokenizer_error(f"vocab_file = {path}", "there is no such file.", f"Or name an encoding: {names}.")
    encoding = RANK_FILES.get(path.stem)
    if encoding is None:
        fix = f"Rename the file to its encoding: {' or '.join(f'{name}.tiktoken' for name in RANK_FILES)}."
        raise tokenizer_error(f"vocab_file = {path}", "does not say by its name which encoding it holds.", fix)
    try:
        ranks = load_tiktoken_bpe(str(path))
    except ValueError as error:
        raise tokenizer_error(f"vocab_file = {path}", f"is not a file of ranks: {error}.", "Copy it again.") from error
    return tiktoken.Encoding(
        path.stem, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=encoding.special
    )
