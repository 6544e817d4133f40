"""What benchmarks/kernels.py concludes from its measurements."""

from __future__ import annotations

from benchmarks.beside_torch import Compared
from benchmarks.kernels import AIMED_AT, Row, best, fastest, misses
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
