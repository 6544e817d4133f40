"""SPMTokenizer: a sentencepiece `.model` file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron.tokenizer.backend import not_unicode
from megatron.tokenizer.base import FastBackend
from megatron.tokenizer.files import required_file, tokenizer_error
from megatron.tokenizer.special import KNOWN_ENDS, KNOWN_PADS, first_id, require_end

KIND = "SPMTokenizer"
CONTENT = "a sentencepiece .model file"


class SPMTokenizer:
    """A sentencepiece model; `<|endoftext|>` ends documents, or the model's own end symbol where it has none."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            fix = "pip install sentencepiece"
            raise tokenizer_error(
                f"tokenizer_type = {KIND}", "needs sentencepiece, which is not installed.", fix
            ) from error
        self.name = KIND
        self.path = path
        self._content = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except Exception as error:  # a RuntimeError of the C++ library
            raise tokenizer_error(f"vocab_file = {path}", f"is not {CONTENT}.", "Name another file.") from error
        self.vocab_size = int(self._model.get_piece_size())
        own_end, own_pad = self._model.eos_id(), self._model.pad_id()
        self._end = first_id(self._piece, KNOWN_ENDS[:1])
        if self._end is None:
            self._end = own_end if own_end >= 0 else first_id(self._piece, KNOWN_ENDS)
        self._pad = own_pad if own_pad >= 0 else first_id(self._piece, KNOWN_PADS)

    def _piece(self, text: str) -> int | None:
        """The id of `text`; the library answers the unknown id for what it does not have."""
        found = int(self._model.piece_to_id(text))
        return found if self._model.id_to_piece(found) == text else None

    @property
    def eod(self) -> int:
        """`<|endoftext|>`, else the model's end symbol."""
        return require_end(self._end, str(self.path))

    @property
    def pad(self) -> int:
        """The model's padding symbol, else `eod`."""
        return self.eod if self._pad is None else self._pad

    def encode(self, text: str) -> list[int]:
        """The ids of one document."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise not_unicode(text) from error
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several documents."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; control symbols have no text, so `skip_special` makes a difference for `eod` only."""
        kept = [int(token) for token in ids if not (skip_special and token == self._end)]
        text: str = self._model.decode(kept)
        return text

    def fingerprint(self) -> str:
        """Sha256 of the model file."""
        return hashlib.sha256(self._content).hexdigest()

    def fast_backend(self) -> FastBackend:
        """The same model in gigatoken."""
        import gigatoken

        fast: FastBackend = gigatoken.Tokenizer.from_sentencepiece(self._content)._backend
        return fast


def load_spm(vocab_file: str | None, merge_file: str | None = None) -> SPMTokenizer:
    """The tokenizer of the sentencepiece model `vocab_file`."""
    fix = "sentencepiece's spm_train makes one."
    return SPMTokenizer(required_file("vocab_file", vocab_file, KIND, CONTENT, fix))
