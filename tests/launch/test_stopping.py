"""SIGTERM and its like in every phase, under our launcher and under plain variables: exit codes, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron import signals
from megatron.checkpoint.load import find_checkpoint
from megatron.config.resolve import resolve
from megatron.config.transport import pack
from megatron.launch import prelude
from megatron.launch.entry import run_worker
from megatron.launch.failure import from_exit
from megatron.launch.port import free_port
from megatron.launch.prelude import PAYLOAD_FLAG
from megatron.launch.requeue import requeue
from megatron.launch.supervise import run_ranks
from megatron.monitor.build import Monitor
from megatron.training.run import train
from tests.end_to_end.stopping import CHANGES, send_in, wait_for
from tests.end_to_end.tiny import settings, write_corpus
from tests.launch.forked import Forked, fork

ROOT = Path(__file__).resolve().parents[2]
NOTHING_LOST = "before its first step: nothing is lost; start the same command again. Exit code 75."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    for end in (".bin", ".idx"):
        (tmp_path / f"corpus{end}").symlink_to(f"{corpus}{end}")
    return tmp_path


def worker(folder: Path, world_size: int, phase: str, send: Callable[[], Any], **changes: Any) -> int:
    """What train.py does, in a process that has its imports behind it; `send` is called in a phase."""
    signals.open_inbox().on_first(prelude._end_at_once)
    Monitor.plot = lambda self: None  # type: ignore[method-assign]
    config = resolve(settings(folder, **{**CHANGES, **changes}), world_size)
    send_in(phase, send)
    return run_worker(train, [PAYLOAD_FLAG, pack(config)])


def own_launcher(folder: Path, phase: str, rank: int | None, number: int = signal.SIGTERM, **changes: Any) -> Forked:
    """Start two ranks under our launcher; the signal goes to a rank, or to the launcher where rank is None."""

    def body(local_rank: int) -> int:
        def send() -> None:
            if rank is None and local_rank == 0:
                os.kill(os.getppid(), number)
                while not signals.open_inbox().numbers:  # until the launcher has passed it on
                    time.sleep(0.01)
            elif rank == local_rank:
                os.kill(os.getpid(), number)

        return worker(folder, 2, phase, send, **changes)

    port = str(free_port(0))
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return fork(lambda: run_ranks(body, environments), folder / "output")


def plain(folder: Path, phase: str, send: Callable[[int], Any], world_size: int = 2, **changes: Any) -> list[Forked]:
    """Start ranks that nobody watches over, as plain variables describe them."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(0))}
    environment = changes.pop("environment", {})

    def start(rank: int) -> Forked:
        body = lambda: worker(folder, world_size, phase, lambda: send(rank), **changes)  # noqa: E731
        return fork(body, folder / f"output{rank}", {"RANK": str(rank), **shared, **environment})

    return [start(rank) for rank in range(world_size)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("global_step*"))


def test_before_the_model_is_built(folder: Path) -> None:
    """One of two ranks is asked, while the other goes on and waits for it."""
    code, said = own_launcher(folder, "before the model", rank=1).end()
    assert code == 75, said
    assert said.count(f"stopped by SIGTERM {NOTHING_LOST}") == 1
    assert "Traceback" not in said
    assert checkpoints(folder) == []


def test_while_one_rank_builds_the_index_and_another_that_waits_is_asked(folder: Path) -> None:
    def send(rank: int) -> None:
        (folder / f"there{rank}").touch()
        if rank == 0:
            time.sleep(60)  # builds, in native code

    ranks = plain(folder, "the index", send)
    for rank in range(2):
        wait_for(folder / f"there{rank}")
    begin = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGUSR1)
    code, said = ranks[1].end()
    assert code == 75, said
    assert f"stopped by SIGUSR1 {NOTHING_LOST}" in said
    assert ranks[0].end()[0] == 75
    assert time.monotonic() - begin < 25


@pytest.mark.parametrize(
    ("phase", "rank", "number", "at"),
    [("the first step", None, signal.SIGUSR1, 1), ("a save", None, signal.SIGTERM, 6)],
)
def test_under_our_launcher(folder: Path, phase: str, rank: int | None, number: signal.Signals, at: int) -> None:
    code, said = own_launcher(folder, phase, rank, number).end()
    assert code == 75, said
    assert said.count(f"stopped at iteration {at} because {number.name} asked for it. ") == 1
    assert f"{folder}/checkpoints holds a checkpoint of it, from which the same command goes on. Exit code 75." in said
    assert find_checkpoint(folder / "checkpoints").name == f"global_step{at}"
    assert "Traceback" not in said


def test_without_a_launcher_a_validation_is_given_up_by_all(folder: Path) -> None:
    send = lambda rank: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None  # noqa: E731
    ends = [rank.end() for rank in plain(folder, "a validation", send)]
    assert [code for code, _ in ends] == [75, 75], ends
    assert ["stopped at iteration 3" in said for _, said in ends] == [True, False]
    assert checkpoints(folder) == ["global_step3"]


def test_a_signal_that_comes_at_the_end_stops_nothing(folder: Path) -> None:
    code, said = own_launcher(folder, "the end", None).end()
    assert code == 0, said
    assert checkpoints(folder)[-1] == "global_step6"


def test_what_is_not_saved_is_lost_and_says_so(folder: Path) -> None:
    send = lambda rank: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    unsaved = {"save": None, "resume": "never", "checkpoint_factor": None}
    code, said = plain(folder, "an accumulation", send, 1, **unsaved)[0].end()
    assert code == 143, said
    assert "Nothing was saved, since save is not set: the 2 steps of this run are lost." in said


def test_a_second_sigterm_ends_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first comes twice, as from a scheduler and a launcher; the second while the rank stands still."""

    def send(rank: int) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        (folder / "asked").touch()
        time.sleep(60)

    monkeypatch.setattr(signals, "ECHO_SECONDS", 0.2)
    [rank] = plain(folder, "a save", send, 1)
    wait_for(folder / "asked")
    time.sleep(0.3)
    os.kill(rank.pid, signal.SIGTERM)
    begin = time.monotonic()
    code, said = rank.end()
    assert code == 143, said
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("changes", "environment", "because"),
    [
        ({"max_wall_time": "0:01:00"}, {"DEEPY_LAUNCH_TIME": -100}, "max_wall_time = 0:01:00 has passed"),
        ({"requeue_exit_code": 9}, {"SLURM_JOB_END_TIME": 110}, "the Slurm job is about to end"),
    ],
)
def test_time_runs_out(folder: Path, changes: dict[str, Any], environment: dict[str, float], because: str) -> None:
    """By the clock of rank 0; Slurm is asked for another turn."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    (tools / "scontrol").chmod(0o755)

    def pass_time(rank: int) -> None:
        os.environ.update({name: repr(time.time() + seconds) for name, seconds in environment.items()})

    slurm = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    keys = {**changes, "slurm_requeue": True, "eval_iters": 0}
    ranks = plain(folder, "before the model", pass_time, environment=slurm, **keys)
    ends = [rank.end() for rank in ranks]
    expected = changes.get("requeue_exit_code", 75)
    assert [code for code, _ in ends] == [expected, expected], ends
    assert f"stopped at iteration 1 because {because}" in ends[0][1]
    assert f"goes on. Job 77 is requeued. Exit code {expected}." in ends[0][1]
    assert (folder / "asked").read_text() == "requeue 77\n"
    assert checkpoints(folder) == ["global_step1"]


def test_a_limit_that_is_over_before_the_loop_is_a_failure(folder: Path) -> None:
    """Another turn would end like it; the model that takes a minute to build is not waited for."""
    environment = {"DEEPY_LAUNCH_TIME": repr(time.time() - 100)}
    slow = lambda rank: time.sleep(60)  # noqa: E731
    [rank] = plain(folder, "before the model", slow, 1, environment=environment, max_wall_time=1)
    code, said = rank.end()
    assert code == 1, said
    assert "max_wall_time = 1 has passed, before a single step was done: the run needs more time than that." in said


def test_what_scontrol_answers_is_said(tmp_path: Path) -> None:
    assert "SLURM_JOB_ID is not, so this is no Slurm job" in requeue({})
    job = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1", "PATH": str(tmp_path)}
    assert requeue(job) == "Job 4_1 is not requeued: there is no scontrol on this machine."
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\necho Requested operation is disabled >&2\nexit 1\n")
    tool.chmod(0o755)
    assert requeue(job) == "Job 4_1 is not requeued, scontrol answered: Requested operation is disabled."
    tool.write_text("#!/bin/sh\nexec /bin/sleep 20\n")
    assert "Job 4_1 is not requeued: scontrol gave no answer" in requeue(job, seconds=0.1)


@pytest.mark.parametrize("has_board", [False, True])
def test_during_the_imports(has_board: bool) -> None:
    """Before torch is there; under deepy.py the launcher says it, of a rank that has left no report."""
    code = "import time; from megatron.launch.prelude import prepare; prepare('train.py', stoppable=True)\n"
    code += "print('ready', flush=True); time.sleep(60)"
    environment = {**os.environ, **({"DEEPY_BOARD": "/nowhere"} if has_board else {})}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert ("stopped by SIGTERM before its first step: nothing is lost" in said) != has_board
    failure = from_exit(75, 0, 0, 1, "n1")
    assert str(failure) == f"stopped by a signal {NOTHING_LOST}"
    assert failure.exit_code == 75
