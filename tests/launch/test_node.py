from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.errors import LaunchError
from megatron.launch import node
from megatron.launch.hosts import Host
from megatron.launch.node import node_environments

ROOT = Path(__file__).resolve().parents[2]
HOSTS = [Host("n1", (0, 1)), Host("n2", (1, 3))]


def test_ranks_are_counted_host_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "visible_gpus", lambda environ: ["0", "1", "2", "3"])
    first, second = node_environments(HOSTS, 1, "n1", 7, {})
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("2", "0", "3", "1")
    assert (second["WORLD_SIZE"], second["CROSS_RANK"], second["MASTER_ADDR"]) == ("4", "1", "n1")
    assert first["CUDA_VISIBLE_DEVICES"] == "1,3"
    monkeypatch.setattr(node, "visible_gpus", lambda environ: ["0", "1"])
    with pytest.raises(LaunchError, match=r"host n2 .* shows 2 GPUs, and slot 3 was asked of it"):
        node_environments(HOSTS, 1, "n1", 7, {})


RANK = """
import os, signal, sys, time
def end(number, frame):
    sys.stdout.write(f"rank {os.environ['RANK']} got {signal.Signals(number).name}\\n")  # whole, beside the other's
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
sys.stdout.write(f"rank {os.environ['RANK']} is up\\n")
if os.environ["RANK"] in sys.argv[1].split(","):
    exec(sys.argv[2])
time.sleep(20)
"""


def start(folder: Path, who: str = "", does: str = "") -> tuple[subprocess.Popen[str], Path]:
    (folder / "rank.py").write_text(RANK)
    run = f"test{os.getpid()}-{time.monotonic_ns()}"
    environ = {
        **os.environ,
        "DEEPY_HOSTS": "n1:0,1",
        "DEEPY_RUN": run,
        "DS_ACCELERATOR": "cpu",
        "XDG_RUNTIME_DIR": str(folder),
    }
    command = [sys.executable, "-c", "import sys; from megatron.launch import node; sys.exit(node.main(sys.argv[1:]))"]
    command += ["0", "127.0.0.1", "7", str(folder / "rank.py"), who, does]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **pipes)  # type: ignore[call-overload]
    return process, folder / f"deepy-{run}-0.pid"


def until_up(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks_and_their_code_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    process, noted = start(tmp_path)
    assert until_up(process) == ["rank 0 is up", "rank 1 is up"]
    os.kill(int(noted.read_text()), number)
    assert process.wait(timeout=10) == 75
    assert process.stdout is not None
    assert sorted(process.stdout) == [f"rank {rank} got {number.name}\n" for rank in range(2)]
    assert not noted.exists()


def test_ranks_end_when_the_first_host_is_gone(tmp_path: Path) -> None:
    process, _ = start(tmp_path)
    until_up(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=10) == 75


def test_what_the_broken_connection_said_is_not_said_again(tmp_path: Path) -> None:
    """A scheduler ends pdsh, and deepy.py passes on what the scheduler told it too: a second SIGTERM would not save."""
    save = "sys.stdout.write('asked\\n'), time.sleep(0.5), sys.stdout.write('saved\\n'), os._exit(75)"
    process, noted = start(tmp_path, "0,1", f"signal.signal(15, lambda *_: ({save})); print('ready')")
    assert {line for _ in range(2) for line in until_up(process)} == {"rank 0 is up", "rank 1 is up", "ready"}
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    assert {process.stdout.readline() for _ in range(2)} == {"asked\n"}
    os.kill(int(noted.read_text()), signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert process.stdout.read().split() == ["saved", "saved"]


def test_the_first_failure_is_the_code_and_the_rest_are_seen_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = start(tmp_path, "1", "sys.exit(7)")
    until_up(process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=10) == 7


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    process, _ = start(tmp_path, "0,1", "os.kill(os.getpid(), 9)")
    assert process.wait(timeout=10) == 137
    assert process.stdout is not None
    assert "rank 1 on host" in (said := process.stdout.read())
    assert "The process was ended by SIGKILL (-9), most often because the machine ran out of memory" in said
