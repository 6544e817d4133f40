"""Run a function in a fork of the test process, which has torch loaded, and see how the fork ends."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import preload


@dataclass
class Forked:
    """A process under way; `end` waits for it and returns its exit code (minus the signal) and what it printed."""

    pid: int
    output: Path

    def end(self, seconds: float = 30) -> tuple[int, str]:
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status), self.output.read_text()
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end; it had printed:\n{self.output.read_text()}")
            time.sleep(0.01)


def fork(function: Callable[[], int], output: Path, environment: Mapping[str, str] | None = None) -> Forked:
    """Start `function` in a fork with stdout and stderr in the file `output`; its value is the exit code."""
    preload()
    pid = os.fork()
    if pid:
        return Forked(pid, output)
    code = 99
    gc.freeze()  # as in tests/ranks.py
    try:
        sys.stdout = sys.stderr = output.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DEEPY_BOARD"):
            os.environ.pop(name, None)
        os.environ.update(environment or {})
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
