from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELAY = """
import sys
from megatron.launch.hosts import Host
from megatron.launch.relay import run_remote
sys.exit(run_remote([sys.executable, "-c", sys.argv[2]], sys.argv[1], [Host("n1", (0,))], "run"))
"""
STARTER = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, frame: (print(signal.Signals(n).name, flush=True), sys.exit(75)))
print("up", flush=True)
signal.pause()
"""


def start(kind: str, path: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PATH": path}
    command = [sys.executable, "-c", RELAY, kind, STARTER]
    process = subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_who_would_kill_at_sigterm_is_told_by_sigusr1() -> None:
    process = start("slurm", os.environ["PATH"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert process.stdout is not None
    assert process.stdout.read() == "SIGUSR1\n"


def test_over_pdsh_each_host_is_told_by_a_pdsh_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "pdsh").write_text(
        f'#!/bin/sh\necho "$@" >{tmp_path}/said.part && mv {tmp_path}/said.part {tmp_path}/said\n'
    )
    (tmp_path / "pdsh").chmod(0o755)
    process = start("pdsh", f"{tmp_path}:{os.environ['PATH']}")
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while not (tmp_path / "said").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    path = '"${XDG_RUNTIME_DIR:-/tmp}/deepy-run-%n.pid"'
    expected = f'-R ssh -S -f 1024 -w n1 test ! -f {path} || kill -s TERM "$(cat {path})"\n'
    assert (tmp_path / "said").read_text() == expected
    process.kill()
    process.wait()
