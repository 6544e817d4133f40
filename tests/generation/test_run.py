"""From a checkpoint and a config to a file of samples."""

from __future__ import annotations

import io
import json
import sys

import pytest
import tokenizers
import torch

from megatron.config.schema.run import GenerationConfig
from megatron.errors import CheckpointError, ConfigError, DataError, TokenizerError
from megatron.generation.generate import Sample
from megatron.generation.load import load_trained
from megatron.generation.prompts import ask, read_prompts, split_prompts
from megatron.generation.records import write_records
from megatron.generation.run import run_generation
from tests.generation.trained import make_config, save_model


def test_a_prompt_file_becomes_records(tmp_path):
    model = save_model(tmp_path / "run", make_config())
    (tmp_path / "prompts.txt").write_text("Hello\n\n  there \n")
    out = tmp_path / "deep" / "out.jsonl"
    keys = {"sample_input_file": str(tmp_path / "prompts.txt"), "sample_output_file": str(out), "maximum_tokens": 7}
    config = make_config(load=str(tmp_path / "run"), **keys)
    samples = run_generation(config)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["context"] for record in records] == ["Hello", "there"]
    assert set(records[0]) == {"context", "text", "length", "finished", "message", "duration_seconds"}
    assert [record["length"] for record in records] == [len(sample.tokens) for sample in samples]
    assert model.embedding is not None


def test_the_model_is_the_checkpoints(tmp_path):
    saved = save_model(tmp_path, make_config())
    trained = load_trained(tmp_path)
    assert trained.folder.name == "global_step3"
    for (name, one), (_, other) in zip(saved.named_parameters(), trained.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float32)])
def test_precision_is_that_of_training_but_fp16_on_the_cpu(tmp_path, precision, dtype):
    save_model(tmp_path, make_config(precision=precision))
    assert {parameter.dtype for parameter in load_trained(tmp_path).model.parameters()} == {dtype}


def test_unconditional_samples_start_a_document(tmp_path):
    save_model(tmp_path / "run", make_config())
    out = str(tmp_path / "s.txt")
    keys = {"save": str(tmp_path / "run"), "checkpoint_factor": 5, "num_samples": 3, "sample_output_file": out}
    samples = run_generation(make_config(**keys, maximum_tokens=5, temperature=1.0))
    assert [sample.context for sample in samples] == ["", "", ""]
    assert len({tuple(sample.tokens) for sample in samples}) == 3


def test_interactive(tmp_path, monkeypatch, capsys):
    save_model(tmp_path, make_config())
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nstop\n"))
    (sample,) = run_generation(make_config(load=str(tmp_path), text_gen_type="interactive", maximum_tokens=4))
    assert f"Hello{sample.text}" in capsys.readouterr().out


def test_never_on_fresh_weights(tmp_path):
    with pytest.raises(ConfigError, match="load is not set"):
        run_generation(make_config())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_generation(make_config(load=str(tmp_path)))


def write_tokenizer(path, words):
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(path))


def test_the_tokenizer_is_the_checkpoints_own_copy(tmp_path):
    vocabulary = tmp_path / "tokenizer.json"
    write_tokenizer(vocabulary, ["a", "b"])
    save_model(tmp_path / "run", make_config(tokenizer_type="HFTokenizer", vocab_file=str(vocabulary)))
    vocabulary.unlink()
    trained = load_trained(tmp_path / "run")
    assert trained.tokenizer.encode("b a") == [2, 1]
    copy = trained.folder.local_path("tokenizer/tokenizer.json")
    write_tokenizer(copy, ["b", "a"])
    with pytest.raises(CheckpointError, match="trained with HFTokenizer"):
        load_trained(tmp_path / "run")
    copy.unlink()
    with pytest.raises(TokenizerError, match="no such file"):
        load_trained(tmp_path / "run")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path):
    vocabulary = tmp_path / "tokenizer.json"
    write_tokenizer(vocabulary, [f"word{number}" for number in range(600)])
    save_model(tmp_path / "run", make_config(tokenizer_type="HFTokenizer", vocab_file=str(vocabulary)))
    with pytest.raises(CheckpointError, match="It has 601 ids and the model's word embedding 512 rows"):
        load_trained(tmp_path / "run")


def test_prompts_are_split_and_stripped():
    assert split_prompts(" a \nb\n\n", "\n") == ["a", "b"]
    assert split_prompts("a\nb END\nc", "END") == ["a\nb", "c"]


def test_prompt_files_that_cannot_be_used(tmp_path):
    def config(name):
        return GenerationConfig(sample_input_file=name)

    with pytest.raises(DataError, match="No such file"):
        read_prompts(config(str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(config(str(tmp_path / "empty.txt")))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(config(str(tmp_path / "latin.txt")))
    with pytest.raises(DataError, match="sample_input_file is not set"):
        read_prompts(GenerationConfig(text_gen_type="input-file"))


def test_asking_over_several_lines():
    source = io.StringIO("one\ntwo END\n\nthree END\nlost\n")
    assert list(ask("END", source, io.StringIO())) == ["one\ntwo", "three", "lost"]
    assert list(ask("\n", io.StringIO("a\n\nb"), io.StringIO())) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt_end", "hint"),
    [("\n", "(one line)"), ("\n====\n", "(any number of lines, then a line `====`)"), ("END", "(ended by 'END')")],
)
def test_a_person_is_told_how_a_prompt_ends(prompt_end, hint):
    screen = io.StringIO()
    list(ask(prompt_end, io.StringIO(), screen))
    assert hint in screen.getvalue()


def test_records_appear_whole_or_not_at_all(tmp_path):
    sample = Sample("a", "b", [1], True, None, 0.5)
    path = tmp_path / "out.jsonl"
    write_records(path, [sample])

    def broken():
        yield sample
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"sample_output_file = .*No space left.*-o out.jsonl"):
        write_records(path, broken())
    assert len(path.read_text().splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
