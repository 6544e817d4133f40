"""Text from a model that several processes share is the text of one process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.errors import ConfigError
from megatron.generation.run import run_generation
from megatron.launch.decoding import decoding_processes
from megatron.parallel.mesh import Mesh
from tests.generation.trained import make_config, save_model
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"num_kv_heads": 4, "pos_emb": "learned", "no_weight_tying": False, "make_vocab_size_divisible_by": 16}
KEYS: dict[str, Any] = {"maximum_tokens": 9, "temperature": 0.8, "top_k": 20}


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "run", make_config(**MODEL))
    (tmp_path / "prompts.txt").write_text("Hello\nto be, or not to be\nx\n")
    files = {"sample_input_file": str(tmp_path / "prompts.txt"), "sample_output_file": str(tmp_path / "out.jsonl")}
    return {**MODEL, **KEYS, **files, "load": str(tmp_path / "run")}


def records(path: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "duration_seconds"} for line in lines]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_model_write_what_one_process_writes(run: dict[str, Any], size: int) -> None:
    def decode() -> list[list[int]]:
        mesh = Mesh.create(tp=size) if size > 1 else Mesh.single()
        return [sample.tokens for sample in run_generation(make_config(**run), mesh)]

    whole = [sample.tokens for sample in run_generation(make_config(**run))]
    written = records(run["sample_output_file"])
    Path(run["sample_output_file"]).unlink()
    assert run_ranks(size, decode) == [whole] * size
    assert records(run["sample_output_file"]) == written
    assert len({tuple(tokens) for tokens in whole}) == 3


def test_a_person_talks_to_rank_0(run: dict[str, Any]) -> None:
    def talk() -> tuple[list[list[int]], str]:
        mesh, screen = Mesh.create(tp=2), io.StringIO()
        sys.stdin, sys.stdout, before = io.StringIO("Hello\nthere\n" if mesh.tp.rank == 0 else ""), screen, sys.stdout
        samples = run_generation(make_config(**run, text_gen_type="interactive"), mesh)
        sys.stdout = before
        return [sample.tokens for sample in samples], screen.getvalue()

    (first, shown), (second, silent) = run_ranks(2, talk)
    assert first == second
    assert len(first) == 2
    assert "Hello" in shown
    assert silent == ""


@pytest.mark.parametrize(
    ("layout", "most", "count"),
    [
        ({"model_parallel_size": 2}, 8, 2),
        ({"model_parallel_size": 2, "pipe_parallel_size": 2}, 8, 4),
        ({"model_parallel_size": 2, "pipe_parallel_size": 2}, 3, 2),
        ({"model_parallel_size": 2, "pipe_parallel_size": 2}, 1, 1),
        ({"model_parallel_size": 2, "pipe_parallel_size": 2, "num_kv_heads": 2}, 8, 2),
        ({"pipe_parallel_size": 2, "intermediate_size": 33}, 8, 1),
        ({"context_parallel_size": 2}, 8, 1),
        ({}, 8, 1),
    ],
)
def test_as_many_processes_share_a_model_as_in_training(layout: dict[str, Any], most: int, count: int) -> None:
    assert decoding_processes(make_config(world_size=4, **{**MODEL, **layout}), most) == count


def test_a_model_that_cannot_be_shared_is_said(tmp_path: Path) -> None:
    save_model(tmp_path, make_config(num_kv_heads=1))
    with pytest.raises(ConfigError, match="they cannot share this model: num_kv_heads = 1") as caught:
        run_ranks(2, lambda: run_generation(make_config(load=str(tmp_path)), Mesh.create(tp=2)))
    assert "Set model_parallel_size: 1" in str(caught.value)


def test_the_launcher_starts_the_processes_that_share_the_model(run: dict[str, Any], tmp_path: Path) -> None:
    """In processes of their own, as a person starts them: 8 s of CPU, most of which is importing torch."""
    run_generation(make_config(**run))
    written = records(run["sample_output_file"])
    Path(run["sample_output_file"]).unlink()
    keys = make_config(**run).flat()
    given = {key: keys[key] for key in ("num_layers", "hidden_size", "num_attention_heads", "seq_length",
                                        "max_position_embeddings", "optimizer", "tokenizer_type", *run)}  # fmt: skip
    (tmp_path / "x.yml").write_text(yaml.safe_dump({**given, "train_micro_batch_size_per_gpu": 1}))
    result = subprocess.run(
        [sys.executable, "deepy.py", "generate.py", str(tmp_path / "x.yml"), "--set", "model_parallel_size=2"],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes on 1 host" in result.stderr
    assert records(run["sample_output_file"]) == written
