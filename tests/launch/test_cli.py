from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.launch import cli
from tests.end_to_end.tiny import settings, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(settings(tmp_path)))
    return str(path)


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "Which script, and which configs?\n\n./deepy.py SCRIPT"),
        (["configs/125M.yml"], 2, "the script comes first. Write: ./deepy.py train.py configs/125M.yml"),
        (["tran.py", "x.yml"], 2, "tran.py: is no script here. The scripts are: generate.py, train.py."),
        (["Makefile", "x.yml"], 2, "Makefile: is not a Python script."),
        (["train.py"], 2, "./deepy.py train.py: needs at least one config file."),
        (["doctor", "x"], 2, "./deepy.py doctor takes no arguments."),
    ],
)
def test_what_a_person_may_type(argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == code
    assert message in capsys.readouterr().err


def test_help_shows_flags_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--set", "--check", "--print", "--hostfile", "--wandb_group", "./deepy.py doctor"):
        assert word in text


def test_print_shows_commands_to_copy(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", config, "--set", "num_gpus=2", "seed=7", "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = f"train.py {config} --set num_gpus=2 --set seed=7"
    assert lines[1].endswith(f"-m torch.distributed.run --standalone --nproc_per_node=2 {words}")
    assert lines[3].startswith("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0")
    assert "DS_ACCELERATOR=cpu OMP_NUM_THREADS=" in lines[4]
    assert lines[4].endswith(f"{words} &")
    assert lines[-1] == "wait"


def test_print_of_several_hosts_is_what_would_run_and_the_same_without_us(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "tell-nobody")
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    assert cli.main(["train.py", config, "-H", str(tmp_path / "hosts"), "--print"]) == 0
    text = capsys.readouterr().out
    assert "# 4 processes on 2 hosts, by pdsh:\npdsh -R ssh -S -f 1024 -w n1,n2 'cd " in text
    assert "train.py --deepy-payload" in text
    where = "--nnodes=2 --nproc_per_node=2 --master_addr=n1 --master_port=29500"
    [line] = [line for line in text.splitlines() if line.startswith("ssh n2 ")]
    there = shlex.split(shlex.split(line)[2])  # as the other host's shell takes it
    assert there[:3] == ["cd", os.getcwd(), "&&"]
    run = f"{sys.executable} -m torch.distributed.run {where} --node_rank=1 train.py {config}"
    assert " ".join(there[4:]).startswith(run)
    assert f"srun --nodes=2 --ntasks-per-node=2 --nodelist=n1,n2 {sys.executable} train.py {config}" in text
    assert "tell-nobody" not in text


def test_a_wrong_config_is_said_before_anything_starts(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train.py", config, "--set", "num_layer=3", "num_gpus=none"]) == 2
    text = capsys.readouterr().err
    assert "num_layer = 3: there is no such key" in text
    assert "num_gpus" in text


def test_the_launcher_loads_neither_torch_nor_deepspeed(config: str) -> None:
    code = (
        "import sys; from megatron.launch.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train.py", config, "--print"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_two_ranks_train_from_the_command_line(config: str, tmp_path: Path) -> None:
    """The whole way: YAML, launcher, two gloo ranks, a step, a checkpoint, metrics."""
    write_corpus(tmp_path / "corpus")
    command = [sys.executable, "deepy.py", "train.py", config, "--set", "num_gpus=2", "train_iters=1", "eval_iters=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "2 processes on 1 host" in result.stderr
    assert result.stderr.count("iteration 1/1 | loss ") == 1
    assert (tmp_path / "checkpoints" / "global_step1").is_dir()
    run = tmp_path / "runs" / "tiny"
    events = [json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events.count("step") == 1
    assert (run / "loss.png").stat().st_size > 1000
    assert yaml.safe_load((run / "config.yml").read_text())["world_size"] == 2


def test_a_script_is_found_from_any_folder(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train.py", "tiny.yml", "--print"]) == 0
    assert f"{ROOT / 'train.py'} tiny.yml" in capsys.readouterr().out
