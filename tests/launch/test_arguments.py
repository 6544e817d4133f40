from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron.config.load import read
from megatron.errors import ConfigError
from megatron.launch.arguments import parse_arguments


def test_everything_at_once() -> None:
    line = "a.yml b -d configs --set seed=7 warmup=0.1 --iteration 5 -H hosts -i in.txt -o out.txt --check --print"
    arguments = parse_arguments(line.split())
    assert arguments.config_files == ["a.yml", "b"]
    assert arguments.config_dir == "configs"
    assert arguments.check
    assert arguments.show
    assert read([], None, arguments.overrides).values.keys() == {
        *("seed", "warmup", "iteration", "hostfile", "sample_input_file", "sample_output_file")
    }


def test_a_flags_text_stays_text() -> None:
    arguments = parse_arguments(["a.yml", "--wandb_run_name", "123", "--wandb_group", "a: b"])
    values = read([], None, arguments.overrides).values
    assert values["wandb_run_name"].value == "123"
    assert values["wandb_group"].value == "a: b"


def test_the_command_line_can_be_typed_again() -> None:
    arguments = parse_arguments(
        ["a.yml", "-d", "my configs", "--set", "prompt_end='\\n'", "--wandb_team", "us", "--print"]
    )
    again = parse_arguments(shlex.split(arguments.command_line()))
    assert again.config_files == arguments.config_files
    assert again.config_dir == arguments.config_dir
    assert again.overrides == arguments.overrides


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"\./deepy\.py train\.py: needs at least one config file\. Write: \./deepy\.py train\.py configs/"),
        ("a.yml --set seed", r"--set seed: is not key=value\. Put config files before --set"),
        ("a.yml --set seed=1 b.yml", r"--set b\.yml: is not key=value\. Put config files before --set"),
        ("a.yml --eval_tasks piqa", "--eval_tasks: evaluation with lm-eval is not part of this version"),
        ("a.yml --autotuning tune", "--autotuning: DeepSpeed's autotuner is not used"),
        ("a.yml --train_iters 5", r"unrecognized arguments: --train_iters 5\. Any key can be set with --set key=value"),
        ("a.yml --iteration soon", "argument --iteration: invalid int value: 'soon'"),
    ],
)
def test_what_cannot_be_understood(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(line.split(), "./deepy.py train.py")


def test_absent_flags_come_with_all_that_is_wrong_besides(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("num_layer: 2\n")
    words = ["--eval_tasks", "piqa", "lambada", str(tmp_path / "a.yml"), "--check", "--autotuning=tune"]
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*words, "--set", "seed=x"])
    said = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert [line.split(": ")[0] for line in said] == [
        "--eval_tasks",
        "--autotuning",
        "--set seed=x",
        "a.yml:1",
        "num_layers, hidden_size, num_attention_heads, seq_length, max_position_embeddings",
    ]


def test_every_text_that_is_no_override_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["a.yml", "--set", "seed", "b.yml"])
    assert [problem.what for problem in caught.value.problems] == ["--set seed", "--set b.yml"]
