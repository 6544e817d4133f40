"""`--check`: what it prints, that it needs no torch, and that it is quick."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.load import load_config
from megatron.errors import ConfigError
from megatron.launch import check

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def write_corpus(prefix: Path, tokens: int, documents: int) -> None:
    """Two-byte tokens; only the header of the index is real, because nothing more is read."""
    prefix.with_suffix(".bin").write_bytes(b"\0\0" * tokens)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
    prefix.with_suffix(".idx").write_bytes(header)


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not an MMIDIDX index"),
        (b"TNTIDX\0\0" + b"\0" * 60, "is not an MMIDIDX index"),
        (None, "does not exist here"),
    ],
)
def test_data_that_is_not_here_or_of_another_format(tmp_path: Path, content: bytes | None, said: str) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    if content is not None:
        (tmp_path / "x.idx").write_bytes(content)
    assert said in check.report(load_config(["125M"], CONFIGS, [f"data_path={tmp_path / 'x'}"]))


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
