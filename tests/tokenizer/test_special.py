"""Which token ends a document where `<|endoftext|>` is absent, ids around a document, and errors by their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from megatron.errors import TokenizerError
from megatron.tokenizer.build import load_tokenizer
from megatron.tokenizer.fast import AWKWARD_TEXTS, choose_encoder
from megatron.tokenizer.train import train_byte_level_bpe


def trained(path: Path, special: list[str], start: str | None = None) -> Path:
    tokenizer = train_byte_level_bpe(["some text to learn from, some more text"] * 3, 280, special)
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("special", "end", "pad"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>"], 1, 1),
        (["<unk>", "<s>", "</s>"], 2, 2),
        (["<pad>", "<eos>", "<bos>"], 1, 0),
        (["<|padding|>", "</s>", "<|endoftext|>"], 2, 0),
    ],
)
def test_end_of_other_families(tmp_path: Path, special: list[str], end: int, pad: int) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(trained(tmp_path / "tokenizer.json", special)))
    assert (tokenizer.eod, tokenizer.pad) == (end, pad)


@pytest.mark.parametrize("value", ["<|fin|>", {"content": "<|fin|>", "lstrip": False}])
def test_end_named_beside_the_file(tmp_path: Path, value: Any) -> None:
    path = trained(tmp_path / "tokenizer.json", ["</s>", "<|fin|>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value, "model_max_length": 4}))
    assert load_tokenizer("HFTokenizer", str(path)).eod == 1


def test_no_end_is_an_error_only_when_it_is_needed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(trained(tmp_path / "tokenizer.json", ["<nothing>"])))
    assert tokenizer.encode("text")
    for name in ("eod", "pad"):
        with pytest.raises(
            TokenizerError, match=r"has no end-of-document token: none of <\|endoftext\|>.* Add <\|endoftext"
        ):
            getattr(tokenizer, name)


def test_ids_that_the_file_adds_are_kept_and_fast(tmp_path: Path) -> None:
    path = trained(tmp_path / "tokenizer.json", ["<|begin_of_text|>", "<|end_of_text|>"], start="<|begin_of_text|>")
    tokenizer = load_tokenizer("HFTokenizer", str(path))
    assert tokenizer.encode("")[:1] == [0]
    encoder = choose_encoder(tokenizer, ["some text"])
    assert encoder.fast is not None, encoder.reason
    for text in AWKWARD_TEXTS:
        assert encoder.fast.encode(text).tolist() == tokenizer.encode(text)


def test_ids_that_are_left_out_count(tmp_path: Path) -> None:
    path = trained(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 500, "content": "<|far|>"})
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer("HFTokenizer", str(path))
    assert tokenizer.encode("<|far|>")[-1] < tokenizer.vocab_size


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    path = trained(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(2)
    backend.enable_padding(length=7)
    backend.save(str(path))
    tokenizer = load_tokenizer("HFTokenizer", str(path))
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"


@pytest.mark.parametrize(
    ("kind", "vocab", "merges", "message"),
    [
        ("HFTokenizer", None, None, "vocab_file is not set: tokenizer_type HFTokenizer needs a tokenizer.json"),
        (
            "HFTokenizer",
            "absent.json",
            None,
            "absent.json: there is no such file; HFTokenizer needs .*train_tokenizer.py",
        ),
        ("HFTokenizer", ".", None, "is a folder; HFTokenizer needs"),
        ("HFTokenizer", "text.txt", None, "text.txt: is not a tokenizer.json of the tokenizers library"),
        (
            "GPT2BPETokenizer",
            "vocab.json",
            None,
            "merge_file is not set: tokenizer_type GPT2BPETokenizer needs GPT-2's m",
        ),
        ("GPT2BPETokenizer", "text.txt", "merges.txt", r"text.txt: is not JSON"),
        ("GPT2BPETokenizer", "list.json", "merges.txt", "list.json: is JSON, but not a map from token to id"),
        (
            "GPT2BPETokenizer",
            "vocab.json",
            "text.txt",
            r"text.txt:1: is not a merge of two tokens: 'no tokenizer at all",
        ),
        ("GPT2BPETokenizer", "vocab.json", "other.txt", "do not fit together.* Take both from one model"),
        ("SPMTokenizer", "text.txt", None, "text.txt: is not a sentencepiece .model file"),
        ("SPMTokenizer", None, None, "vocab_file is not set: tokenizer_type SPMTokenizer needs a sentencepiece"),
        ("TiktokenTokenizer", None, None, "vocab_file is not set: .* Set it to one of .*cl100k_base"),
        ("TiktokenTokenizer", "cl101k_base", None, "cl101k_base: is no encoding of tiktoken and no file. Known: "),
        ("TiktokenTokenizer", "absent.tiktoken", None, "absent.tiktoken: there is no such file. Or name an encoding"),
        ("TiktokenTokenizer", "mine.tiktoken", None, "mine.tiktoken: does not say by its name which encoding"),
        ("TiktokenTokenizer", "o200k_base.tiktoken", None, "o200k_base.tiktoken: is not a file of ranks"),
        ("HFGPT2Tokenizer", "absent/model.json", None, "is not a folder, and HFGPT2Tokenizer takes a model folder"),
        (
            "HFGPT2Tokenizer",
            "empty",
            None,
            "empty: holds neither a tokenizer.json nor a vocab.json with its merges.txt",
        ),
        ("Foo", None, None, "tokenizer_type = Foo: is not a known kind. Choose one of GPT2BPETokenizer, HFTokenizer"),
    ],
)
def test_errors_name_the_file_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, vocab: str | None, merges: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in {
        "text.txt": "no tokenizer at all",
        "list.json": "[1, 2]",
        "vocab.json": '{"a": 0, "b": 1}',
        "merges.txt": "#version: 0.2\n",
        "other.txt": "x y\n",
        "mine.tiktoken": "",
        "o200k_base.tiktoken": "what is this\n",
    }.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(kind, vocab, merges)


def test_a_hub_name_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise OSError("no route to the hub\nmore lines")

    monkeypatch.setattr("megatron.tokenizer.hf_gpt2.tokenizers.Tokenizer.from_pretrained", no_network, raising=False)
    with pytest.raises(
        TokenizerError, match=r"gpt2: is no local folder, and the hub did not give it \(no route to the hub\)"
    ):
        load_tokenizer("HFGPT2Tokenizer")
