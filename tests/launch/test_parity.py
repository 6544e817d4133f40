"""`./deepy.py parity`: what it prints, and its exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.load import load_config
from megatron.launch import cli, parity
from megatron.proof.shrink import Trial, shrink
from tests.launch.forked import fork

ROOT = Path(__file__).resolve().parents[2]
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_layout_passes_from_the_command_line() -> None:
    """In a process of its own, as a person starts it: 8 s of CPU, most of which is importing torch and DeepSpeed."""
    words = ["parity", "configs/125M.yml", "--set", "model_parallel_size=2", "precision=fp32"]
    result = subprocess.run(
        [sys.executable, "deepy.py", *words],
        env={**os.environ, **CPU},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("4 processes (CPU, gloo): data 2 x tensor 2, ZeRO 1 and one process, 3 steps\n")
    assert "num_layers 12 -> 2" in result.stdout
    assert result.stdout.endswith("PASS: this layout trains as one process does.\n")
    assert result.stderr == ""


def test_a_wrong_layout_exits_with_1(tmp_path: Path) -> None:
    trial = shrink(load_config(["configs/125M.yml"], overrides=["precision=fp32"], planning=True, announce=False))

    def wrong() -> int:
        from megatron.engine.step import StepEngine

        StepEngine._sum = lambda self, value: value  # type: ignore[method-assign]
        return parity.run_trial(trial, [])

    code, text = fork(wrong, tmp_path / "out", CPU).end(60)
    assert code == 1
    assert re.search(r"loss, step 1 .* <-- differs", text)
    assert text.rstrip().splitlines()[-1].startswith("FAIL: this layout does not train as one process does.")


def test_a_rank_that_fails_is_reported(tmp_path: Path) -> None:
    trial = shrink(load_config(["configs/125M.yml"], overrides=["precision=fp32"], planning=True, announce=False))

    def failing() -> int:
        from megatron.engine.step import StepEngine

        def no_step(*args: object) -> None:
            raise RuntimeError("the layer is gone")

        StepEngine.train_step = no_step  # type: ignore[method-assign, assignment]
        return parity.run_trial(trial, [])

    code, text = fork(failing, tmp_path / "out", CPU).end(60)
    assert code not in (0, 1) or "the layer is gone" in text
    assert "the layer is gone" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs at least one config file."),
        (["configs/125M.yml", "--check"], "parity has no --check and no --print. Leave the flag out."),
        (["configs/125M.yml", "--set", "model_parallel_size=5"], "cannot be split over model_parallel_size = 5"),
    ],
)
def test_mistakes_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", *words]) == 2
    assert message in capsys.readouterr().err


def test_ranks_go_to_gpus_where_there_are_enough() -> None:
    trial: Trial = shrink(load_config(["configs/125M.yml"], planning=True, announce=False))
    on_gpus = parity.rank_environments(trial, ["3", "5", "7"], {})
    assert [each["CUDA_VISIBLE_DEVICES"] for each in on_gpus] == ["3,5"] * 2
    assert {each["DS_ACCELERATOR"] for each in on_gpus} == {"cuda"}
    on_cpu = parity.rank_environments(trial, [], {"LOGLEVEL": "INFO"})
    assert [each["RANK"] for each in on_cpu] == ["0", "1"]
    assert on_cpu[0]["DS_ACCELERATOR"] == "cpu"
    assert on_cpu[0]["LOGLEVEL"] == "INFO"
