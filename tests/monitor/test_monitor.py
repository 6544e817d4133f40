from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import DeepyError
from megatron.monitor import build
from megatron.monitor.build import Monitor, build_monitor
from megatron.monitor.metrics import read_metrics, series
from megatron.monitor.plot import smooth
from megatron.monitor.run_folder import run_name, saved_config
from megatron.monitor.throughput import Work
from megatron.monitor.timers import Timers
from tests.end_to_end.tiny import settings

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    loss: float = 2.5
    num_tokens: int = 128
    learning_rate: float = 1e-3
    grad_norm: float = 3.0
    clipped_grad_norm: float = 1.0
    loss_scale: float = 1.0
    skipped: bool = False


def config(folder: Path, **changes: Any) -> Config:
    return resolve(settings(folder, **changes))


def open_monitor(folder: Path, start: int = 0, is_first_rank: bool = True, **changes: Any) -> Monitor:
    work = Work(samples=4, tokens=128, flops_per_token=10, causal_flops_per_token=8, peak_tflops=1)
    return build_monitor(config(folder, **changes), work, is_first_rank, 8, start)


def step(monitor: Monitor, iteration: int, **values: Any) -> None:
    monitor.start_step(iteration)
    monitor.log_step(iteration, Result(**values))


def test_a_run_leaves_metrics_config_and_plot(tmp_path: Path) -> None:
    monitor = open_monitor(tmp_path)
    monitor.log_validation(0, 6.0)
    for iteration in range(1, 5):
        step(monitor, iteration, loss=5.0 - iteration / 2)
    monitor.log_validation(4, 3.0, character_perplexity=2.0)
    monitor.log_checkpoint(4, tmp_path / "global_step4")
    monitor.close()
    folder = tmp_path / "runs" / "tiny"
    assert monitor.folder == folder
    records = read_metrics(folder / "metrics.jsonl")
    kinds = [record["event"] for record in records]
    assert kinds == ["start", "validation", "first_step", *["step"] * 4, "validation", "checkpoint"]
    assert series(records, "step", "loss") == ([1, 2, 3, 4], [4.5, 4.0, 3.5, 3.0])
    assert records[-2]["character_perplexity"] == 2.0
    assert {"grad_norm", "clipped_grad_norm", "learning_rate", "tokens_per_second", "seconds"} <= records[4].keys()
    saved = yaml.safe_load((folder / "config.yml").read_text())
    assert saved["seed"] == 1234
    assert resolve(saved).flat() == config(tmp_path).flat()
    image = (folder / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG")


def test_a_resumed_run_appends_and_a_fresh_one_keeps_the_old_file(tmp_path: Path) -> None:
    for start, stop, loss in ((0, 6, 4.0), (3, 5, 2.0)):
        monitor = open_monitor(tmp_path, start)
        for iteration in range(start + 1, stop + 1):
            step(monitor, iteration, loss=loss)
        monitor.close()
    path = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert series(read_metrics(path), "step", "loss") == ([1, 2, 3, 4, 5], [4.0, 4.0, 4.0, 2.0, 2.0])
    open_monitor(tmp_path, 0).close()
    assert [record["event"] for record in read_metrics(path)] == ["start"]
    assert series(read_metrics(path.with_name("metrics.1.jsonl")), "step", "loss")[0] == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = open_monitor(tmp_path, is_first_rank=False)
    step(monitor, 1)
    monitor.log_validation(1, 3.0)
    monitor.log_checkpoint(1, tmp_path)
    monitor.close()
    assert monitor.folder is None
    assert not (tmp_path / "runs").exists()


def test_sinks_get_the_names_that_dashboards_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, float] = {}

    class Sink:
        is_open = True

        def write(self, scalars: dict[str, float], iteration: int) -> None:
            sent.update(scalars)

        def close(self, failed: bool = False) -> None:
            sent["closed"] = 1

    monkeypatch.setattr(build, "_open_sinks", lambda *_: [Sink()])
    monitor = open_monitor(tmp_path)
    with monitor.timers.measure("batch"):
        time.sleep(0.01)
    step(monitor, 1)
    monitor.log_validation(1, 3.0, character_perplexity=1.5)
    monitor.log_validation(1, 3.0, name="test")
    monitor.close()
    assert sent.keys() == {
        *("train/lm_loss", "train/learning_rate", "train/grad_norm", "train/clipped_grad_norm", "train/loss_scale"),
        *("train/skipped", "runtime/samples_per_sec", "runtime/iteration_time", "runtime/steps_per_sec"),
        *("runtime/tokens_per_sec", "runtime/flops_per_sec_per_gpu", "runtime/model_flops_utilization"),
        *("runtime/causal_model_flops_utilization", "runtime/hardware_flops_utilization", "timers/batch"),
        *("validation/lm_loss", "validation/lm_loss_ppl", "validation/lm_loss_char_lvl_ppl"),
        *("test/lm_loss", "test/lm_loss_ppl", "closed"),
    }
    assert sent["timers/batch"] >= 0.01


def test_without_matplotlib_training_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(logging.getLogger("deepy"), "propagate", True)
    monitor = open_monitor(tmp_path)
    step(monitor, 1)
    monitor.close()
    assert any("To have it: pip install matplotlib" in record.message for record in caplog.records)


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DeepyError, match=r"runs_dir = .*runs: .*Set runs_dir to a folder that is writable"):
        open_monitor(tmp_path)


def test_names_of_runs(tmp_path: Path) -> None:
    assert run_name(config(tmp_path)) == "tiny"
    assert run_name(config(tmp_path, run_name=None, wandb_run_name="w")) == "w"
    assert len(run_name(config(tmp_path, run_name=None))) == len("2026-01-31_12-59-59")


def test_no_secret_is_saved(tmp_path: Path) -> None:
    others = {"comet_others": {"note": "kept", "api_key": "tell-nobody", "inner": [{"s3_secret_key": "tell-nobody"}]}}
    saved = saved_config(config(tmp_path).model_copy(
        update={"monitor": config(tmp_path).monitor.model_copy(update=others)}
    ))  # fmt: skip
    assert "tell-nobody" not in str(saved)
    assert saved["comet_others"] == {"note": "kept", "inner": [{}]}


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, megatron.monitor.build\n"
        "print(sorted({'torch', 'matplotlib', 'wandb', 'tensorboard', 'comet_ml', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.strip() == "[]"


def test_smoothing_is_unbiased_at_the_start() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 3.0], weight=0.5) == pytest.approx([1.0, (0.5 * 0.5 * 1 + 0.5 * 3) / 0.75])


def test_timers_give_means_and_start_anew() -> None:
    timers = Timers()
    for _ in range(2):
        with timers.measure("sleep"):
            time.sleep(0.01)
    means = timers.drain()
    assert 0.01 <= means["sleep"] < 0.2
    assert timers.drain() == {}
