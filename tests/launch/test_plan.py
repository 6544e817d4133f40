"""The command: its exit codes, what it prints, and that it needs no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launch.plan import DOES_NOT_FIT, main

ROOT = Path(__file__).resolve().parents[2]
LARGE = str(ROOT / "configs" / "20B.yml")
SMALL = str(ROOT / "configs" / "125M.yml")


def test_a_run_that_fits(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # the first line shows the config's path as it was given
    assert main(["configs/20B.yml", "--gpus", "96", "--gpu-memory", "40"]) == 0
    text = capsys.readouterr().out
    for part in ("Fits: ", "data 12 x tensor 2 x pipeline 4", "8.6% with equal stages", "days for 150,000 steps",
                 "9.7e-05 at 1,500", "MFU 60% of 312", "33-43"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_run_that_does_not_fit_says_so_and_what_would(capsys, tmp_path):
    file = tmp_path / "plan.json"
    words = [LARGE, "--gpus", "8", "--gpu-memory", "40", "--json", str(file)]
    assert main([*words, "--set", "pipe_parallel_size=1", "model_parallel_size=1"]) == DOES_NOT_FIT
    text = capsys.readouterr().out
    assert "Does not fit: " in text
    assert "Cheapest changes that make it fit" in text or "No three changes make it fit" in text
    data = json.loads(file.read_text())
    assert data["fits"] is False
    assert data["peak_bytes"] == data["stages"][0]["total"] > data["limit_bytes"] == 40 * 2**30


def test_a_micro_batch_that_is_left_open_is_the_largest_that_fits(capsys):
    words = [SMALL, "--gpus", "1", "--gpu-memory", "24", "--set", "train_micro_batch_size_per_gpu=auto"]
    words += ["train_batch_size=512", "gradient_accumulation_steps=null"]
    sizes = {}
    for more in (
        (),
        ("checkpoint_activations=true", "checkpoint_operations=[norm,activation]"),
        ("moments_dtype=bf16",),
    ):
        assert main([*words, *more]) == 0
        text = capsys.readouterr().out
        sizes[more[:1]] = int(re.search(r"micro-batch (\d+) x accumulation (\d+)", text)[1])
        assert "Fits: " in text
    plain, recomputed, compact = sizes.values()
    assert 512 % plain == 0
    assert 1 < plain < recomputed
    assert plain <= compact
    assert main([*words, "train_micro_batch_size_per_gpu=512", "find_micro_batch_size=false"]) == DOES_NOT_FIT


def test_a_list_among_changes_is_yaml(capsys):
    overrides = ["pipe_parallel_size=1", "model_parallel_size=1", "checkpoint_activations=false"]
    main([str(ROOT / "configs/pythia/6-9B.yml"), "--gpus", "8", "--gpu-memory", "80", "--set", *overrides])
    assert "checkpoint_operations: [norm, activation]" in capsys.readouterr().out


def test_search_prints_a_ranking_and_how_to_take_the_first(capsys):
    assert main([SMALL, "--gpus", "8", "--gpu", "H100", "--search"]) == 0
    text = capsys.readouterr().out
    assert "Fastest layouts that fit" in text
    assert "For the first: --set " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [LARGE, "--gpus", "96", "--gpu", "A100-80", "--set", "precision=fp8", "fp16=null"],
            "A100-80 has no float8 products, which need compute capability 8.9. Set precision: bf16, or give --gpu",
        ),
        ([LARGE, "--gpus", "7"], "cannot be divided into groups of 2 x pipe_parallel_size"),
        ([LARGE, "--gpus", "many"], "invalid whole number above 0 value: 'many'"),
        ([LARGE, "--mfu", "3"], "invalid share above 0, up to 1 value: '3'"),
        ([LARGE, "--set", "hidden_size"], "is not key=value"),
        ([SMALL, "--json", "/nowhere/plan.json"], "cannot be written: No such file or directory"),
        ([], "needs at least one config file"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ConfigError, match=message):
        main(words)


def test_it_runs_without_torch():
    code = f"import sys; from megatron.launch.plan import main; main([{SMALL!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
