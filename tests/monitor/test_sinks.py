from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.config.schema.run import MonitorConfig
from megatron.monitor import wandb_sink
from megatron.monitor.comet_sink import CometSink
from megatron.monitor.sinks import GuardedSink, Sink
from megatron.monitor.tensorboard_sink import TensorBoardSink
from megatron.monitor.wandb_sink import WandbSink

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    """A sink that fails at the iteration `bad`."""

    def __init__(self, bad: int | None = None) -> None:
        self.written: list[int] = []
        self.bad = bad

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        if iteration == self.bad:
            raise ConnectionError("the network is down")
        self.written.append(iteration)

    def close(self, failed: bool = False) -> None:
        self.written.append(-1)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("deepy"), "propagate", True)
    return caplog


def test_a_failing_sink_warns_once_and_stops_nothing(warnings: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(bad=2)
    sink = GuardedSink("Somewhere", lambda: recorder, "pip install somewhere")
    for iteration in range(5):
        sink.write({"train/lm_loss": 1.0}, iteration)
    sink.close()
    assert recorder.written == [0, 1]
    assert [record.message for record in warnings.records] == [
        "Somewhere failed and gets no more numbers; training goes on. ConnectionError: the network is down"
    ]


def test_a_missing_package_says_what_to_install(warnings: pytest.LogCaptureFixture) -> None:
    def open_sink() -> Sink:
        raise ModuleNotFoundError("No module named 'wandb'")

    sink = GuardedSink("Weights & Biases", open_sink, "pip install -r requirements/wandb.txt")
    assert not sink.is_open
    sink.write({}, 1)
    assert [record.message for record in warnings.records] == [
        "Weights & Biases: No module named 'wandb'. Nothing is sent there. "
        "To have it: pip install -r requirements/wandb.txt"
    ]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path / "run")
    sink.write({"train/lm_loss": 2.5, "train/learning_rate": 0.25}, 1)
    sink.write({"train/lm_loss": 1.5}, 2)
    sink.close()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/learning_rate", "train/lm_loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [(1, 2.5), (2, 1.5)]


def test_tensorboard_shows_no_step_of_a_resumed_run_twice(tmp_path: Path) -> None:
    """The first process was killed after step 5; its last checkpoint was of step 3."""
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3, 4, 5)), (3, (4, 5, 6))):
        sink = TensorBoardSink(tmp_path / "run", start)
        for step in steps:
            sink.write({"loss": start + step}, step)
        sink.close()
        files = sorted((tmp_path / "run").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        files[-1].rename(tmp_path / "run" / f"events.out.tfevents.{len(files)}")  # both began in the same second
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 7.0), (5, 8.0), (6, 9.0)]


class FakeWandb(types.ModuleType):
    """Records what is asked of it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []

    def init(self, **keys: Any) -> FakeWandb:
        self.started = keys
        return self

    def Settings(self, **keys: Any) -> dict[str, Any]:  # noqa: N802 - wandb's name
        return keys

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.logged.append((scalars, step))

    def finish(self, exit_code: int) -> None:
        self.logged.append(({}, -1 - exit_code))


def test_wandb_gets_project_group_name_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monitor = MonitorConfig(wandb_project="p", wandb_group="g", wandb_team="t", wandb_host="https://w.example")
    sink = WandbSink(monitor, "run", tmp_path, {"seed": 7})
    sink.write({"train/lm_loss": 1.0}, 3)
    sink.close()
    expected = {"project": "p", "group": "g", "entity": "t", "name": "run", "config": {"seed": 7}, "resume": "allow"}
    assert {key: fake.started[key] for key in expected} == expected
    assert fake.started["settings"]["base_url"] == "https://w.example"
    assert fake.logged == [({"train/lm_loss": 1.0}, 3), ({}, -1)]
    first = fake.started["id"]
    WandbSink(monitor, "run", tmp_path, {}).close(failed=True)
    assert fake.logged[-1] == ({}, -2), "a run that failed is shown as failed"
    assert fake.started["id"] == first, "a resumed run is the same run"


@pytest.mark.parametrize(
    ("use_wandb", "environ", "wanted"),
    [
        (None, {}, False),
        (None, {"WANDB_API_KEY": "k"}, True),
        (None, {"WANDB_MODE": "offline"}, True),
        (None, {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, False),
        (False, {"WANDB_API_KEY": "k"}, False),
        (True, {}, True),
    ],
)
def test_when_wandb_is_used(
    use_wandb: bool | None, environ: dict[str, str], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert wandb_sink.is_wanted(MonitorConfig(use_wandb=use_wandb)) is wanted


def test_a_login_in_netrc_counts_for_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine w.example login user password k\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_sink.is_wanted(MonitorConfig(wandb_host="https://w.example"))
    assert not wandb_sink.is_wanted(MonitorConfig())


def test_wandb_works_offline(tmp_path: Path) -> None:
    """The real library, in a process of its own, without a key and without a network."""
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron.config.schema.run import MonitorConfig\n"
        "from megatron.monitor.wandb_sink import WandbSink\n"
        "sink = WandbSink(MonitorConfig(), 'run', Path(sys.argv[1]), {'seed': 7})\n"
        "sink.write({'train/lm_loss': 1.0}, 1)\n"
        "sink.close()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"}
    environment.update(WANDB_MODE="offline", HOME=str(tmp_path))
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_comet_gets_names_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    class Experiment:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **keys: asked.append((name, keys or args))

    fake = types.ModuleType("comet_ml")
    fake.start = lambda **keys: asked.append(("start", keys)) or Experiment()  # type: ignore[attr-defined,func-returns-value]
    monkeypatch.setitem(sys.modules, "comet_ml", fake)
    sink = CometSink(MonitorConfig(comet_project="p", comet_workspace="w", comet_tags=["a"]), "run", {"seed": 7})
    sink.write({"train/lm_loss": 1.0}, 3)
    sink.close()
    assert asked[0] == ("start", {"workspace": "w", "project_name": "p"})
    assert ("set_name", ("run",)) in asked
    assert ("add_tags", (["a"],)) in asked
    assert asked[-2:] == [("log_metrics", {"step": 3}), ("end", ())]
