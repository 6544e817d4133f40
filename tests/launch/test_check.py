"""`--check`: what it prints, that it needs no torch, and that it is quick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.config.load import load_config
from megatron.data.indexed import IndexedWriter
from megatron.errors import ConfigError
from megatron.launch import check, cli

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def write_corpus(prefix: Path, tokens: int, documents: int) -> None:
    """Two-byte tokens, zero, in documents of equal length."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.zeros(tokens, np.uint16), np.diff(np.linspace(0, tokens, documents + 1, dtype=int)))


def test_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    write_corpus(tmp_path / "text", tokens=20_480, documents=100)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(
        json.dumps(
            {"model": {"vocab": {f"t{n}": n for n in range(300)}}, "added_tokens": [{"content": "<|endoftext|>"}]}
        )
    )
    overrides = [
        f"data_path={tmp_path / 'text'}", 'split="50,25,25"', "tokenizer_type=HFTokenizer", f"vocab_file={tokenizer}",
        "train_iters=10", "lr_decay_iters=10", "warmup=0.1", "seed=7",
    ]  # fmt: skip
    settings = ["train_iters", "lr_decay_iters", "warmup"]
    assert check.run_check(["125M"], str(CONFIGS), overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(CONFIGS / "125M.yml")
    text = "\n".join(" ".join(line.split()) for line in lines)
    for expected in (
        "num_layers 12",
        "seed 7",
        "processes 1 = data 1 x tensor 1 x pipeline 1",
        "ZeRO stage 1",
        "precision bf16 (fp32 masters, gradients accumulated and reduced in fp32)",
        "global batch 4 sequences = 4 x 1 x 1",
        "tokens per step 8,192",
        "length 10 steps = 81,920 tokens",
        f"data {tmp_path / 'text'}: 20,480 tokens in 100 documents, 50.0% of them for training: 8 epochs",
        "vocabulary 301 padded to 384",
        "parameters 85,645,824 (85,056,000 without embeddings and head)",
        "learning rate 0.0006 at 0, 0.0006 at 1",
        "6e-05 at 10",
    ):
        assert expected in text, expected
    assert "Before it can train" not in text
    assert all(key in text for key in settings)


def test_what_is_missing_is_said() -> None:
    text = check.report(load_config(["20B"], CONFIGS, planning=True))
    assert "Before it can train:" in text
    assert "data_path: no training data is named." in text
    assert "a guess: the tokenizer's file is not here" in text


def test_processes_that_share_a_sequence_are_told_apart() -> None:
    sizes = ["global_num_gpus=8", "context_parallel_size=2", "model_parallel_size=2"]
    text = " ".join(check.report(load_config(["125M"], CONFIGS, sizes, planning=True)).split())
    assert "processes 8 = data 2 x tensor 2 x pipeline 1 x context 2" in text
    assert "8 sequences = 4 x 1 x 2 (micro-batch x accumulation x data parallel)" in text


def test_keys_at_their_defaults_are_not_repeated() -> None:
    config = load_config(["125M"], CONFIGS, ["weight_decay=0.1", "norm=LayerNorm"])
    keys = [key for key, _ in check.differences(config)]
    assert "hidden_size" in keys
    assert not {"weight_decay", "norm", "train_batch_size", "world_size"} & set(keys)


def refusal(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `--check` says about the 125M model with more keys, which it refuses with exit code 2."""
    (folder / "more.yml").write_text(text)
    assert cli.main(["train.py", str(CONFIGS / "125M.yml"), str(folder / "more.yml"), "--check"]) == 2
    return capsys.readouterr().err.replace(f"{folder}/", "")


def test_an_index_of_another_format_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    for content, said in (
        (b"", "x.idx is not an MMIDIDX index."),
        (
            b"TNTIDX\0\0" + b"\0" * 60,
            'x.idx is in the legacy TNTIDX format (data_impl "cached"), and is not an MMIDIDX',
        ),
        (b"MMIDIDX\0\0\1\0", "x.idx is truncated within its header (11 bytes)."),
        (b"MMIDIDX\0\0" + b"\7" * 60, "x.idx has version 506381209866536711 and token type 7"),
    ):
        (tmp_path / "x.idx").write_bytes(content)
        found = refusal(tmp_path, f"\ndata_path: {tmp_path / 'x'}\n", capsys)
        assert f"more.yml:2: data_path = x: {said}" in found
        assert "build them with tools/preprocess_data.py" in found


def test_a_truncated_file_of_a_data_set_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "x", tokens=20_480, documents=729)
    text = f"train_data_paths: [{tmp_path / 'x'}]\ntrain_label_data_paths: [{tmp_path / 'nowhere'}]\n"
    index, tokens = tmp_path / "x.idx", tmp_path / "x.bin"
    whole = index.read_bytes()
    index.write_bytes(whole[:1000])
    said = "train_data_paths = x: x.idx is truncated: 1,000 bytes, but its 729 documents need 14,622."
    assert said in refusal(tmp_path, text, capsys)
    index.write_bytes(whole)
    tokens.write_bytes(tokens.read_bytes()[:-100])
    said = (
        "more.yml:1: train_data_paths = x: x.bin is truncated: 40,860 bytes, but x.idx lists documents of 40,960 bytes."
    )
    assert said in refusal(tmp_path, text, capsys)
    tokens.write_bytes(tokens.read_bytes() + b"\0" * 200)
    assert "x.bin is of another data set: 41,060 bytes" in refusal(tmp_path, text, capsys)


def test_a_vocab_file_that_is_no_tokenizer_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in (
        ("num_layers: 1", "it is not JSON (Expecting value: line 1 column 1 (char 0)), but tokenizer_type HFTokenizer"),
        ('["a", "b"]', 'it is a list without the entry "model" with a "vocab", so no tokenizer.'),
        ('{"model": null}', 'it is JSON without the entry "model" with a "vocab", so no tokenizer.'),
        ('{"model": {"vocab": [1, 2]}}', 'it is JSON without the entry "model" with a "vocab", so no tokenizer.'),
        ('{"model": {"vocab": {}}, "added_tokens": [1]}', 'it is JSON without the entry "model"'),
    ):
        (tmp_path / "vocab").write_text(content)
        text = f"tokenizer_type: HFTokenizer\nvocab_file: {tmp_path / 'vocab'}\n"
        found = refusal(tmp_path, text, capsys)
        assert found.startswith(f"more.yml:2: vocab_file = vocab: {said}")
        assert found.endswith("tools/train_tokenizer.py trains one.\n")


def test_broken_files_are_all_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.bin", "x.idx", "vocab"):
        (tmp_path / name).write_bytes(b"")
    keys = f"data_path: {tmp_path / 'x'}\ntokenizer_type: HFTokenizer\nvocab_file: {tmp_path / 'vocab'}\n"
    assert [line.split(" = ")[0] for line in refusal(tmp_path, keys, capsys).splitlines()] == [
        "more.yml:1: data_path",
        "more.yml:3: vocab_file",
    ]


def test_a_unigram_vocabulary_is_counted(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": None}))
    keys = ["tokenizer_type=HFTokenizer", f"vocab_file={tokenizer}"]
    assert check.vocabulary_size(load_config(["125M"], CONFIGS, keys)) == (2, True)


def test_files_that_are_not_here_stand_under_what_is_missing(tmp_path: Path) -> None:
    keys = ["data_path=nope", "tokenizer_type=HFTokenizer", "vocab_file=nope.json", "valid_data_paths=null"]
    table, missing = check.report(load_config(["125M"], CONFIGS, keys)).split("Before it can train:\n")
    assert "nope" not in table.split("Follows from it:")[1]
    assert missing.splitlines() == [
        "  data_path = nope: there is no nope.bin and no nope.idx here. Correct the path; or it may be on the machine "
        "that trains.",
        "  vocab_file = nope.json: there is no such file here. Correct the path; or it may be on the machine that "
        "trains.",
    ]


def test_a_model_whose_tokenizer_is_one_file_is_told_of_that_kind() -> None:
    text = check.report(load_config(["pythia/160M"], CONFIGS, planning=True))
    assert (
        "merge_file: tokenizer_type GPT2BPETokenizer needs it. Add merge_file: <path>; where the tokenizer is a "
        in text
    )
    assert "set tokenizer_type: HFTokenizer and vocab_file: tokenizer.json" in text


def test_problems_are_raised_for_the_command_line_to_print() -> None:
    with pytest.raises(ConfigError, match="--set num_layers=x"):
        check.run_check(["125M"], str(CONFIGS), ["num_layers=x"])


def test_a_blend_has_a_line_for_each_part(tmp_path: Path) -> None:
    for name, tokens in (("a", 8192), ("b", 81_920)):
        write_corpus(tmp_path / name, tokens, 10)
    paths = f"train_data_paths=[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    overrides = [paths, "train_data_weights=[1, 3]", "train_iters=40", "lr_decay_iters=40"]
    text = check.report(load_config(["125M"], CONFIGS, overrides))
    assert "100.0% of them for training: 10 epochs" in text
    assert "100.0% of them for training: 3 epochs" in text


def test_no_torch_is_loaded_and_it_is_quick() -> None:
    """The aim is 0.7 s of wall time; processor time is what a busy machine does not change."""
    program = (
        "import sys, time, megatron.launch.check as c; c.run_check(['125M', 'local_setup'], sys.argv[1]);"
        "assert not {'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules), 'a heavy import';"
        "print(time.process_time(), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(CONFIGS)]
    runs = [subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    assert min(float(run.stderr) for run in runs) < 0.6


def test_a_doubled_key_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = refusal(tmp_path, "seed: 1\nseed: 2\nsplit: x\nmaster_port: 0\nnum_layer: 2\n", capsys)
    assert [line.split(": ")[0] for line in found.splitlines()] == [f"more.yml:{line}" for line in (2, 3, 4, 5)]


def test_a_hostfile_that_cannot_be_read_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = refusal(tmp_path, "hostfile: /nowhere\nseed: x\n", capsys).splitlines()
    assert found[0].startswith('more.yml:2: seed = "x"')
    assert found[1].startswith("more.yml:1: hostfile = /nowhere: cannot be read (No such file or directory).")
    (tmp_path / "more.yml").write_text("hostfile: /nowhere\n")
    words = ["train.py", str(CONFIGS / "125M.yml"), str(tmp_path / "more.yml")]
    assert cli.main([*words, "--check"]) == 0
    assert f"  {tmp_path}/more.yml:1: hostfile = /nowhere: cannot be read" in capsys.readouterr().out
    assert cli.main(words) == 1
    assert f"{tmp_path}/more.yml:1: hostfile = /nowhere" in capsys.readouterr().err
    assert cli.main([*words, "--set", "seed=x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_hostfile_with_bad_lines_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("n1 8\n")
    found = refusal(tmp_path, f"hostfile: {tmp_path / 'hosts'}\n", capsys)
    assert found.startswith("hosts:1: n1 8: is not a host with its number of devices.")
