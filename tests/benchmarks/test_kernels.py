"""What benchmarks/kernels.py concludes from its measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.beside_torch import Compared
from benchmarks.kernel_works import WORKS
from benchmarks.kernels import AIMED_AT, Clock, Row, best, fastest, misses, on_a_gpu
from megatron.ops.measured import Fastest


def row(candidate: str, milliseconds: float, hidden: int = 4096, tokens: int = 16384, share: float = 0.9) -> Row:
    return Row("rms_norm", candidate, "bfloat16", tokens, hidden, 1.0, 1.0, share, share, milliseconds)


def test_the_fastest_at_the_tokens_of_the_aims_is_what_auto_gets() -> None:
    rows = [
        row("eager", 3.0), row("triton", 1.0), row("liger", 2.0), row("eager", 1.0, 768), row("triton", 2.0, 768),
        row("liger", 0.1, 768, tokens=2048),
    ]  # fmt: skip
    assert fastest(rows, "NVIDIA H200") == [
        Fastest("NVIDIA H200", "rms_norm", 768, "eager"),
        Fastest("NVIDIA H200", "rms_norm", 4096, "triton"),
    ]


def test_compiling_must_win_clearly() -> None:
    assert best([row("eager", 1.0), row("compile", 0.95)]) == "eager"
    assert best([row("eager", 1.0), row("compile", 0.8)]) == "compile"


def test_what_falls_short_of_the_aims_is_named() -> None:
    assert misses([row("triton", 1.0), row("eager", 1.0, share=0.1), row("triton", 1.0, 768, share=0.1)]) == []
    assert misses([row("triton", 1.0, share=0.8)]) == ["rms_norm: 80% forward, 80% backward"]
    assert (row("triton", 1.0).tokens, row("triton", 1.0).hidden) == AIMED_AT


def test_a_comparison_misses_its_aim_by_more_than_noise_only() -> None:
    measured = ((1.04, 1, 2.0), (1.1, 1, 1.1), (0.8, 1.5, 0.8), (1.1, 1, 1.0))  # the last by neighbours alone
    compared = [Compared("swiglu", "float32", 2, ours, 1.0, aim, busy, 1.0) for ours, aim, busy in measured]
    assert [each.is_short for each in compared] == [False, True, True, False]
    assert compared[1].miss() == "swiglu, float32, 2 threads: 0.91 times PyTorch, aim 1"
    assert not Compared("softmax", "float32", 2, 9.0, 1.0, 0, 9.0, 1.0).is_short


def test_a_gpus_measurements_end_at_the_limit_and_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU in a GPU's place, where eager is all that runs."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(kernels, "GPU_SIZES", [(AIMED_AT[0], 8), (64, 8)])
    monkeypatch.setattr("megatron.ops.compiled.compiler_obstacle", lambda: "not in this test")
    monkeypatch.setattr("megatron.ops.cpu.library.make_ready", lambda device: "not in this test")
    monkeypatch.setattr(Clock, "copy_bandwidth", lambda self: 1e9)
    works = [work for work in WORKS if work.operation in ("rms_norm", "add_layer_norm")]
    clock = Clock(torch.device("cpu"), seconds=0.0)
    written: list[list[Fastest]] = []
    monkeypatch.setattr(kernels, "write", written.append)
    for limit, sizes in ((0.0, 2), (1e-9, 1)):
        options = argparse.Namespace(quick=False, limit=limit, json=tmp_path / "out.json", write=True)
        written.clear()
        measured = on_a_gpu(options, works, clock)
        assert len({row.tokens for row in measured.rows}) == sizes
        assert {row.candidate for row in measured.rows} == {"eager"}
        assert all(row.forward > 0 and row.backward > 0 for row in measured.rows)
        assert Fastest("NVIDIA X", "rms_norm", 8, "eager") in measured.fastest
        assert json.loads(options.json.read_text())["fastest"][-1]["operation"] == "rms_norm"
        assert written[0] == written[-1] == measured.fastest, "also what a run has that is stopped after the first size"
    assert "nothing of 64 tokens of 8" in capsys.readouterr().out


def test_what_fails_to_run_costs_its_own_row_only(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(tokens: int, hidden: int, draw: object) -> kernels.Arguments:
        raise RuntimeError("out of\nmemory")

    works = [
        kernels.Work("rms_norm", broken, lambda hidden: 1.0, None),
        *[w for w in WORKS if w.operation == "bias_gelu"],
    ]
    clock = Clock(torch.device("cpu"), seconds=0.0)
    rows = list(kernels.measured_rows(works, (4, 8), clock, 1e9, torch.float32))
    assert {row.operation for row in rows} == {"bias_gelu"}
    assert "rms_norm: eager: 4 tokens of 8: RuntimeError: out of memory" in capsys.readouterr().err


def test_what_weighs_most_is_measured_first_and_compiled_where_it_was_measured() -> None:
    passes = kernels.gpu_passes(quick=False)
    assert [size for size, compiled in passes if compiled] == list(kernels.COMPILED_AT)
    assert passes[: len(kernels.COMPILED_AT)] == [(size, False) for size in kernels.COMPILED_AT]
    assert [size for size, compiled in passes if not compiled] == kernels.GPU_SIZES
    assert kernels.gpu_passes(quick=True) == [(AIMED_AT, False), (AIMED_AT, True)]
