"""gigatoken is used where it gives the same ids, and only there; arrays of ids and sizes for preprocessing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import normalizers

from megatron.tokenizer.base import Accelerated
from megatron.tokenizer.bounded import Bounded, process_memory
from megatron.tokenizer.build import load_tokenizer
from megatron.tokenizer.char_level import CharLevelTokenizer
from megatron.tokenizer.fast import DocumentEncoder, choose_encoder
from megatron.tokenizer.train import train_byte_level_bpe


class Off:
    """A fast backend that is wrong for one letter."""

    vocab_size = 512

    def encode(self, text: str) -> NDArray[Any]:
        return np.frombuffer(text.replace("q", "p").encode(), np.uint8)


class Wrong(CharLevelTokenizer):
    def fast_backend(self) -> Off:
        return Off()


class Unloadable(CharLevelTokenizer):
    def fast_backend(self) -> Off:
        raise ValueError("unknown pre-tokenizer\nat line 3")


class Plain:
    """The protocol without a fast backend."""

    name = "Plain"
    vocab_size = 512
    eod = pad = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return bytes(ids).decode()

    def fingerprint(self) -> str:
        return ""


def test_a_difference_in_the_sample_falls_back_and_says_so() -> None:
    assert choose_encoder(Wrong(), ["a fine text"]).fast is not None
    encoder = choose_encoder(Wrong(), ["a fine text", "quite"])
    assert encoder.fast is None
    assert encoder.reason == "Encoding with CharLevelTokenizer: gigatoken gives other ids for 'quite'."
    assert encoder.encode(["quite"], None, np.dtype("u2"))[0].tolist() == list(b"quite")


def test_a_tokenizer_that_gigatoken_cannot_load_falls_back_and_says_so() -> None:
    reason = choose_encoder(Unloadable(), []).reason
    assert reason == "Encoding with CharLevelTokenizer: gigatoken cannot load it (unknown pre-tokenizer)."
    assert choose_encoder(Plain(), []).reason == "Encoding with Plain, which has no faster implementation."


@pytest.mark.parametrize("fast", [False, True])
def test_ids_sizes_and_ends(fast: bool) -> None:
    encoder = choose_encoder(CharLevelTokenizer() if fast else Plain(), [])
    assert (encoder.fast is not None) is fast
    tokens, sizes = encoder.encode(["ab", "", "c"], 7, np.dtype("<i4"))
    assert tokens.tolist() == [97, 98, 7, 7, 99, 7]
    assert tokens.dtype == np.dtype("<i4")
    assert sizes.tolist() == [3, 1, 2]
    tokens, sizes = encoder.encode(["ab", "", "c"], None, np.dtype("<u2"))
    assert (tokens.tolist(), sizes.tolist(), tokens.dtype) == ([97, 98, 99], [2, 0, 1], np.dtype("<u2"))
    tokens, sizes = encoder.encode([], 7, np.dtype("<u2"))
    assert (tokens.size, sizes.size) == (0, 0)


NORMALIZERS = {"none": None, "NFC": normalizers.NFC(), "NFKC": normalizers.Sequence([normalizers.NFKC()])}


@pytest.fixture(params=[(name, space) for name in NORMALIZERS for space in (False, True)], ids=str)
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> DocumentEncoder:
    name, prefix_space = request.param
    texts = [Path(__file__).read_text(encoding="utf-8"), "naïve café — Straße ﬁ ½ 日本語 😀"] * 2
    backend = train_byte_level_bpe(texts, 500, prefix_space=prefix_space)
    if NORMALIZERS[name] is not None:
        backend.normalizer = NORMALIZERS[name]
    backend.save(str(tmp_path / "tokenizer.json"))
    return choose_encoder(load_tokenizer("HFTokenizer", str(tmp_path / "tokenizer.json")), texts)


def test_gigatoken_equals_tokenizers_for_any_text(encoder: DocumentEncoder) -> None:
    assert encoder.fast is not None, encoder.reason
    check_any_text(encoder)


def test_gigatoken_equals_tokenizers_for_every_combining_mark(encoder: DocumentEncoder) -> None:
    assert encoder.fast is not None
    letters = [chr(code) for code in range(0x300, 0x20000) if not 0xD800 <= code < 0xE000]
    marks = [c for c in letters if unicodedata.combining(c) or unicodedata.decomposition(c) or not c.isprintable()]
    texts = [f"a{c}b{c}\u0301 {c}1{c}\u0323." for c in marks[::7]] + [f"<|endoftext|>{c}" for c in "\u0338\u0301a"]
    texts.append("\uff1c|endoftext|\uff1e <|endoftext|\uff1e")
    for text, ids in zip(texts, encoder.tokenizer.encode_batch(texts), strict=True):
        assert encoder.fast.encode(text).tolist() == ids, ascii(text)


def test_the_memory_of_words_is_given_back(bpe_file: Path) -> None:
    """gigatoken remembers every word; new ones for ever must not fill the memory."""
    growth = []
    for is_bounded in (True, False):  # each in a process of its own, where no memory of another is left
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            growth.append(process.submit(growth_over_new_words, bpe_file, is_bounded).result())
    assert growth[0] < 0.6 * growth[1]


def growth_over_new_words(bpe_file: Path, is_bounded: bool) -> int:
    """By how many bytes the process grows at most while 20 MB of words that occur once are encoded."""
    tokenizer = load_tokenizer("HFTokenizer", str(bpe_file))
    assert isinstance(tokenizer, Accelerated)
    bounded = Bounded(tokenizer.fast_backend, limit=20 << 20, check=1 << 20)
    backend = bounded if is_bounded else tokenizer.fast_backend()
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    draw = np.random.default_rng(0)
    before = process_memory()
    assert before is not None
    largest = before
    for _ in range(20):
        words = letters[draw.integers(0, 26, (100_000, 10))]
        words[:, 0] = 32
        backend.encode(words.tobytes().decode())
        largest = max(largest, process_memory() or 0)
    assert bounded.encode("some words").tolist() == tokenizer.encode("some words")
    assert bounded.vocab_size == tokenizer.vocab_size
    return largest - before


def test_without_the_systems_help_the_text_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.tokenizer.bounded.process_memory", lambda: None)
    monkeypatch.setattr("megatron.tokenizer.bounded.TEXT_LIMIT", 100)
    loads = []
    bounded = Bounded(lambda: (loads.append(1), CharLevelTokenizer().fast_backend())[1], check=10)
    for _ in range(40):
        assert bounded.encode("seven..").tolist() == list(b"seven..")
    assert len(loads) == 3


def check_any_text(encoder: DocumentEncoder) -> None:
    assert encoder.fast is not None
    fast = encoder.fast

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=60))
    def check(text: str) -> None:
        assert fast.encode(text).tolist() == encoder.tokenizer.encode(text)

    check()


def test_the_lossless_default_is_always_fast(bpe_file: Path) -> None:
    encoder = choose_encoder(load_tokenizer("HFTokenizer", str(bpe_file)), ["text"])
    assert encoder.fast is not None
    assert encoder.reason == (
        "Encoding with gigatoken, checked against HFTokenizer on 1 documents (4 characters), the same ids."
    )
