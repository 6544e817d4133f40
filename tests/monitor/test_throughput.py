from __future__ import annotations

import pytest

from megatron.monitor.throughput import StepClock, Work, known_peak, speed


def test_rates_without_flops() -> None:
    now = speed(Work(samples=8, tokens=1024), seconds=0.5)
    assert (now.tokens_per_second, now.samples_per_second) == (2048, 16)
    assert now.mfu is None
    assert now.tflops_per_device is None


def test_both_conventions_of_mfu() -> None:
    """2 GPUs of 100 TFLOP/s, 1e12 tokens/s at 60 (whole) and 45 (causal) FLOPs: 30 TFLOP/s each."""
    work = Work(1, 10**12, 2, flops_per_token=60, causal_flops_per_token=45, peak_tflops=100)
    now = speed(work, seconds=1.0)
    assert now.tflops_per_device == pytest.approx(30)
    assert now.mfu == pytest.approx(0.30)
    assert now.causal_mfu == pytest.approx(0.225)
    assert now.hfu == pytest.approx(0.30)


def test_recomputation_is_work_of_the_hardware_only() -> None:
    work = Work(1, 10**12, 1, 60, 60, 100, recomputes=True)
    now = speed(work, seconds=1.0)
    assert now.hfu == pytest.approx(now.mfu * 4 / 3)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA B200", 2250.0),
        ("AMD EPYC", None),
    ],
)
def test_known_peaks(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_the_first_step_is_forgotten_once_there_is_another() -> None:
    clock = StepClock(window=3)
    assert clock.mean() == 0
    clock.add(60.0)
    assert clock.mean() == 60
    for seconds in (1.0, 2.0, 3.0, 4.0):
        clock.add(seconds)
    assert clock.mean() == 3.0
