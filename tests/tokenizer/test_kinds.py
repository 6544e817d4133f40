"""Every kind behind the protocol: round trips, special ids, sizes, fingerprints, and GPT-2's own algorithm."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.schema.data import TokenizerConfig
from megatron.errors import TokenizerError
from megatron.tokenizer.base import Accelerated, Tokenizer
from megatron.tokenizer.build import LOADERS, build_tokenizer, load_tokenizer
from megatron.tokenizer.fast import AWKWARD_TEXTS
from megatron.tokenizer.tiktoken_bpe import RANK_FILES

Load = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def load(bpe_file: Path, gpt2_files: tuple[Path, Path], spm_file: Path, rank_file: Path) -> Load:
    places = {
        "HFTokenizer": (bpe_file, None),
        "GPT2BPETokenizer": gpt2_files,
        "HFGPT2Tokenizer": (gpt2_files[0].parent, None),
        "SPMTokenizer": (spm_file, None),
        "TiktokenTokenizer": (rank_file, None),
        "CharLevelTokenizer": (None, None),
    }

    def load_kind(kind: str) -> Tokenizer:
        vocab, merges = places[kind]
        return load_tokenizer(kind, str(vocab) if vocab else None, str(merges) if merges else None)

    return load_kind


LOSSLESS = sorted(set(LOADERS) - {"SPMTokenizer"})


@pytest.mark.parametrize("kind", LOADERS)
def test_special_ids_and_sizes(load: Load, kind: str) -> None:
    tokenizer = load(kind)
    expected = {
        "HFTokenizer": (900, 0, 1),
        "GPT2BPETokenizer": (899, 898, 898),
        "HFGPT2Tokenizer": (900, 898, 899),
        "SPMTokenizer": (600, 2, 2),
        "TiktokenTokenizer": (100277, 100257, 100257),
        "CharLevelTokenizer": (512, 0, 1),
    }
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == expected[kind]
    assert tokenizer.name == kind
    assert all(0 <= token < tokenizer.vocab_size for text in AWKWARD_TEXTS for token in tokenizer.encode(text))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_awkward_texts_come_back(load: Load, kind: str) -> None:
    tokenizer = load(kind)
    for text in AWKWARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_any_text_comes_back(load: Load, kind: str) -> None:
    tokenizer = load(kind)

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=40))
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_sentencepiece_gives_its_own_normal_form_back(load: Load) -> None:
    tokenizer = load("SPMTokenizer")
    for text in ("def f(self): return 1", "Straße — naïve café 日本語 😀", "\u0001 x"):
        once = tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.encode(once) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("Straße 日本語 😀")) == "Straße 日本語 😀"


@pytest.mark.parametrize("kind", LOADERS)
def test_a_batch_is_the_same_as_one_by_one(load: Load, kind: str) -> None:
    tokenizer = load(kind)
    texts = list(AWKWARD_TEXTS)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", LOADERS)
def test_special_tokens_can_be_left_out(load: Load, kind: str) -> None:
    tokenizer = load(kind)
    ids = [*tokenizer.encode("some text"), tokenizer.eod]
    assert tokenizer.decode(ids, skip_special=True) == "some text"


@pytest.mark.parametrize("kind", LOADERS)
def test_half_of_a_surrogate_pair_is_an_error(load: Load, kind: str) -> None:
    tokenizer = load(kind)
    message = r"character 2 of the text: is '\\ud83d', half of a surrogate pair"
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode_batch(["fine", "ab\ud83d"])


@pytest.mark.parametrize("kind", LOADERS)
def test_gigatoken_gives_the_same_ids(load: Load, kind: str) -> None:
    tokenizer = load(kind)
    assert isinstance(tokenizer, Accelerated)
    fast = tokenizer.fast_backend()
    texts = [*AWKWARD_TEXTS, Path(__file__).read_text(encoding="utf-8")]
    if kind == "SPMTokenizer":  # whether it agrees everywhere is for the check at start; here: on plain text
        texts = ["def f(self): return 1", "The quick brown fox"]
    for text in texts:
        assert fast.encode(text).tolist() == tokenizer.encode(text), text[:60]


@pytest.mark.parametrize("kind", LOADERS)
def test_fingerprints_are_stable_and_distinct(load: Load, kind: str) -> None:
    assert load(kind).fingerprint() == load(kind).fingerprint()
    assert len({load(other).fingerprint() for other in LOADERS}) == len(LOADERS)
    assert regex.fullmatch("[0-9a-f]{64}", load(kind).fingerprint())


def test_fingerprint_ignores_layout_and_sees_a_changed_merge(bpe_file: Path, tmp_path: Path) -> None:
    content = json.loads(bpe_file.read_text(encoding="utf-8"))
    original = load_tokenizer("HFTokenizer", str(bpe_file)).fingerprint()
    (tmp_path / "same.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert load_tokenizer("HFTokenizer", str(tmp_path / "same.json")).fingerprint() == original
    content["model"]["merges"][5:7] = content["model"]["merges"][6:4:-1]
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert load_tokenizer("HFTokenizer", str(tmp_path / "other.json")).fingerprint() != original


def gpt2_by_the_book(vocab: dict[str, int], merges: list[str], text: str) -> list[int]:
    """GPT-2's algorithm in its plainest form: split, map bytes to letters, merge the best pair until none is left."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {value: chr(value) for value in visible}
    letters |= {value: chr(256 + index) for index, value in enumerate(v for v in range(256) if v not in letters)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    splitter = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = []
    for part in regex.split(r"(<\|endoftext\|>)", text):
        if part == "<|endoftext|>":
            ids.append(vocab[part])
            continue
        for word in splitter.findall(part):
            symbols = [letters[value] for value in word.encode()]
            while True:
                pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
                if not pairs:
                    break
                index = min(pairs)[1]
                symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
            ids.extend(vocab[symbol] for symbol in symbols)
    return ids


def test_gpt2_ids_are_those_of_the_original_algorithm(load: Load, gpt2_files: tuple[Path, Path]) -> None:
    vocab = json.loads(gpt2_files[0].read_text(encoding="utf-8"))
    merges = gpt2_files[1].read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = load("GPT2BPETokenizer")
    for text in [*AWKWARD_TEXTS, Path(__file__).read_text(encoding="utf-8")[:3000]]:
        assert tokenizer.encode(text) == gpt2_by_the_book(vocab, merges, text)


def test_character_level_ids_are_the_bytes(load: Load) -> None:
    tokenizer = load("CharLevelTokenizer")
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert tokenizer.decode([97, 300, 0xC3, 0xA9, 10, 0xFF]) == "aé\n\ufffd"
    assert tokenizer.decode([97, 0, 1], skip_special=True) == "a"


@pytest.mark.parametrize("name", RANK_FILES)
def test_rank_files_split_as_tiktoken_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public

    ranks = {bytes([value]): value for value in range(256)}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    theirs = getattr(openai_public, name)()
    assert theirs["special_tokens"] == RANK_FILES[name].special
    for text in [*AWKWARD_TEXTS, Path(__file__).read_text(encoding="utf-8")[:5000]]:
        found = regex.findall(RANK_FILES[name].pattern, text)
        assert found == regex.findall(theirs["pat_str"], text)
        assert "".join(part if isinstance(part, str) else part[0] for part in found) == text


def test_kinds_are_matched_in_any_case_and_from_a_config(bpe_file: Path) -> None:
    assert load_tokenizer("hftokenizer", str(bpe_file)).name == "HFTokenizer"
    config = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(bpe_file))
    assert build_tokenizer(config).vocab_size == 900


def test_tokenizer_of_the_recorded_runs(golden: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(golden / "train" / "data" / "tokenizer_small.json"))
    assert (tokenizer.eod, tokenizer.pad) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("To be, or not to be")) == "To be, or not to be"


def test_tiktoken_names_are_known() -> None:
    assert set(RANK_FILES) <= set(tiktoken.list_encoding_names())
