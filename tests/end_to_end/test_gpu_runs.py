"""Whole runs on one GPU, through the launcher: they follow the same run on the CPU, and resume where they stopped."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.ops.fp8 import obstacle
from tests.end_to_end.tiny import losses, settings, write_corpus

ROOT = Path(__file__).resolve().parents[2]
GPU = os.environ.get("DEEPY_TEST_DEVICE", "cuda")  # "cpu" tries these tests themselves where there is no GPU
PLAIN = {"hidden_dropout": 0.0, "attention_dropout": 0.0}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]


def start(script: str, folder: Path, device: str, **changes: Any) -> str:
    """Run `./deepy.py script` with the tiny run's config in `folder`; return what it printed."""
    if not (folder / "corpus.bin").exists():
        write_corpus(folder / "corpus")
    (folder / "tiny.yml").write_text(yaml.safe_dump(settings(folder, **{**PLAIN, **changes})))
    environment = {**os.environ, "DS_ACCELERATOR": device}
    command = [sys.executable, "deepy.py", script, str(folder / "tiny.yml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


train = functools.partial(start, "train.py")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run in fp32 on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    train(folder, "cpu", zero_optimization={"stage": 0})
    return losses(folder)


@pytest.mark.parametrize(("engine", "stage"), [("local", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)])
def test_fp32_is_the_run_on_the_cpu(engine: str, stage: int, tmp_path: Path, on_cpu: dict[int, float]) -> None:
    """By our own engine, and by DeepSpeed's, which nothing else asks for on one process."""
    train(tmp_path, GPU, zero_optimization={"stage": stage}, engine=engine)
    assert losses(tmp_path) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_recorded_steps_are_those_of_the_run_on_the_cpu(size: int, tmp_path: Path, on_cpu: dict[int, float]) -> None:
    """CUDA graphs of passes and updates, and of whole steps, with validations and checkpoints between the steps."""
    shape = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": 4 // size}
    train(tmp_path, GPU, zero_optimization={"stage": 0}, cuda_graphs=GPU == "cuda", **shape)
    assert losses(tmp_path) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("engine", "stage"), [("local", 0), ("deepspeed", 1)])
def test_half_precision_stays_near_it(
    precision: str, engine: str, stage: int, tmp_path: Path, on_cpu: dict[int, float]
) -> None:
    if (GPU, engine, precision) == ("cpu", "deepspeed", "fp16"):
        pytest.skip("DeepSpeed's fp16 needs a GPU")
    scale = {"fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else {"precision": precision}
    keys = {"engine": engine, "precision": precision, **scale}
    train(tmp_path, GPU, zero_optimization={"stage": stage}, **keys)
    assert losses(tmp_path) == pytest.approx(on_cpu, rel=3e-2)


@pytest.mark.parametrize(("engine", "stage"), [("local", 0), ("deepspeed", 3)])
def test_fp8_stays_near_it_as_well(engine: str, stage: int, tmp_path: Path, on_cpu: dict[int, float]) -> None:
    reason = obstacle(torch.device(GPU, 0))
    if reason:
        pytest.skip(reason)
    said = train(tmp_path, GPU, zero_optimization={"stage": stage}, engine=engine, precision="fp8")
    assert "the linear layers of the blocks multiply in float8" in said
    assert losses(tmp_path) == pytest.approx(on_cpu, rel=3e-2)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_stopped_run_continues_as_the_whole_one(recomputes: bool, tmp_path: Path) -> None:
    changes = {"precision": "bf16", "hidden_dropout": 0.1, "checkpoint_activations": recomputes}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", GPU, **changes)
    train(tmp_path / "broken", GPU, exit_interval=4, **changes)
    train(tmp_path / "broken", GPU, **changes)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_text_of_a_checkpoint_is_the_cpus(tmp_path: Path) -> None:
    train(tmp_path, GPU)
    texts = {}
    for device in ("cpu", GPU):
        keys = {"text_gen_type": "input-file", "sample_input_file": str(tmp_path / "prompts.txt"), "maximum_tokens": 16}
        (tmp_path / "prompts.txt").write_text("def main(\nimport o\n")
        output = tmp_path / f"{device}.jsonl"
        start("generate.py", tmp_path, device, load=str(tmp_path / "checkpoints"), sample_output_file=str(output),
              temperature=0.0, **keys)  # fmt: skip
        texts[device] = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert len(texts["cpu"]) == 2
    assert texts[GPU] == texts["cpu"]
