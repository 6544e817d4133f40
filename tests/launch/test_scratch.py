from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from megatron.launch import scratch


def test_what_killed_processes_leave_the_next_one_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "deepy-scratch-of-a-person").mkdir()
    reading, writing = os.pipe()
    killed = os.fork()
    if killed == 0:
        os.write(writing, str(scratch.make()).encode())
        signal.pause()
    left = Path(os.read(reading, 1000).decode())
    kept = scratch.make()
    for folder in (left, kept):
        os.utime(folder / ".deepy-alive", (0, 0))
    young = scratch.make()
    assert left.exists()  # its process lives
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    scratch.make()
    assert not left.exists()
    assert kept.exists()
    assert young.exists()
    assert (tmp_path / "deepy-scratch-of-a-person").exists()
