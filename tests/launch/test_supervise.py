"""Ranks are forked from a Python that never loads torch, so each test takes a fraction of a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The ranks meet at files in the folder `meet`, so that no test depends on the order in which they start.
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from megatron.errors import DataError, Problem
from megatron import whereabouts
from megatron.launch.supervise import Patience, run_ranks
meet = Path(sys.argv[1])
def wait_for(name, seconds=10):
    deadline = time.time() + seconds
    while not (meet / name).exists():
        assert time.time() < deadline, name
        time.sleep(0.01)
def at_step(rank, step):
    whereabouts.begin_step(step)
def run(body, ranks, **patience):
    sys.exit(run_ranks(body, [{"WORLD_SIZE": str(ranks), "RANK": str(rank)} for rank in range(ranks)],
                       Patience(**patience)))
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(code: str, folder: Path) -> tuple[int, str, float]:
    """Run to the end; return the exit code, stderr, and the seconds it took."""
    begin = time.monotonic()
    process = start(code, folder)
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr, time.monotonic() - begin


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_all_ranks_run_with_their_environment(tmp_path: Path) -> None:
    code, stderr, _ = finish(
        "def body(rank):\n (meet / os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n return 0\nrun(body, 3)",
        tmp_path,
    )
    assert (code, stderr) == (0, "")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "3", "1": "3", "2": "3"}


def test_a_failure_is_shown_once_and_last_and_ends_the_others(tmp_path: Path) -> None:
    code, stderr, seconds = finish(
        """
def body(rank):
    if rank == 1:
        at_step(1, 12)
        raise ValueError("the loss is a " + "banana")  # Python 3.13 shows this line in the traceback
    print("noise of another rank", file=sys.stderr, flush=True)
    time.sleep(60)
run(body, 3)
""",
        tmp_path,
    )
    assert code == 1
    assert seconds < 10
    assert stderr.count("the loss is a banana") == 1
    assert stderr.count("Traceback") == 1
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("rank 1 of 3 on host ")
    assert last.endswith("failed at step 12, in batch, exit code 1. The other ranks were stopped.")
    assert stderr.index("noise of another rank") < stderr.index("Traceback")


def test_the_launchers_own_frames_are_not_in_the_traceback(tmp_path: Path) -> None:
    _, stderr, _ = finish("def body(rank):\n raise ValueError('x')\nrun(body, 1)", tmp_path)
    assert "supervise.py" not in stderr
    assert "ValueError: x" in stderr


def test_the_cause_is_preferred_to_its_echo(tmp_path: Path) -> None:
    code, stderr, _ = finish(
        """
def body(rank):
    if rank == 0:
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242")
    time.sleep(0.2)
    raise ZeroDivisionError("the cause")
run(body, 2, echo=5)
""",
        tmp_path,
    )
    assert code == 1
    assert "ZeroDivisionError: the cause" in stderr
    assert "Connection closed" not in stderr


def test_a_mistake_of_the_user_is_said_once_without_a_traceback(tmp_path: Path) -> None:
    code, stderr, _ = finish(
        """
def body(rank):
    raise DataError(Problem("data_path = x", "is missing.", "Prepare it.", "a.yml:3"))
run(body, 3)
""",
        tmp_path,
    )
    assert code == 2
    assert stderr.strip() == "a.yml:3: data_path = x: is missing. Prepare it."


def test_a_signal_is_explained(tmp_path: Path) -> None:
    number, words = signal.SIGKILL, ["SIGKILL (-9)", "ran out of memory", "GiB of this machine's"]
    code, stderr, _ = finish(
        f"""
def body(rank):
    at_step(rank, 7)
    if rank == 1:
        os.kill(os.getpid(), {int(number)})
    time.sleep(60)
run(body, 2)
""",
        tmp_path,
    )
    assert code == 128 + number
    assert "rank 1 of 2" in stderr
    assert "at step 7" in stderr
    for word in words:
        assert word in stderr


def test_an_exit_code_without_a_message_is_a_failure(tmp_path: Path) -> None:
    code, stderr, _ = finish("def body(rank):\n os._exit(3)\nrun(body, 1)", tmp_path)
    assert code == 3
    assert "ended without a message of its own" in stderr
    assert "rank 0 on host" in stderr
    assert "before its first step, in start-up, exit code 3." in stderr


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code, _, seconds = finish(
        """
def body(rank):
    if rank == 1:
        wait_for("deaf")
        raise ValueError("over")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (meet / "deaf").touch()
    time.sleep(60)
run(body, 2, failed=0.3)
""",
        tmp_path,
    )
    assert code == 1
    assert seconds < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    process = start(
        """
def body(rank):
    at_step(rank, 4)
    (meet / f"ready{rank}").touch()
    time.sleep(60)
run(body, 2)
""",
        tmp_path,
    )
    wait_for(tmp_path / "ready0")
    wait_for(tmp_path / "ready1")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert stderr.strip() == f"stopped by {number.name} in step 4."


def test_a_rank_may_finish_its_work_after_sigterm(tmp_path: Path) -> None:
    process = start(
        """
def body(rank):
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    (meet / "ready").touch()
    while not asked:
        time.sleep(0.01)
    (meet / "saved").touch()
    return 0
run(body, 1)
""",
        tmp_path,
    )
    wait_for(tmp_path / "ready")
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert (tmp_path / "saved").exists()


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = start(
        "def body(rank):\n (meet / 'pid').write_text(str(os.getpid()))\n (meet / 'ready').touch()\n time.sleep(60)\n"
        "run(body, 1)",
        tmp_path,
    )
    wait_for(tmp_path / "ready")
    process.kill()
    process.communicate(timeout=20)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    code = PREAMBLE + "run(lambda rank: 0, 2)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_under_nohup_the_end_of_the_terminal_is_not_the_runs(tmp_path: Path) -> None:
    """A blocked signal arrives even where it is ignored; it began the countdown to the run's end."""
    code = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
def body(rank):
    (meet / "up").touch()
    wait_for("told")
    time.sleep(0.2)
    return 0
run(body, 1, asked=0.0, failed=0.0)
"""
    process = start(code, tmp_path)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGHUP)
    (tmp_path / "told").touch()
    assert process.wait(timeout=10) == 0
