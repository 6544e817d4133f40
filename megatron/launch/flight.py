"""NCCL's last collectives, which torch keeps for each rank (its flight recorder), written when a run hangs.

torch writes them when a byte arrives in a named pipe, from a thread that needs neither Python nor the device. Whoever
watches a rank asks for them so, in a folder that both know.

The pipe and the variables are those of torch 2.13 (`FlightRecorder.hpp`, `ProcessGroupNCCL.hpp`). No part of this has
run with NCCL yet.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, MutableMapping
from pathlib import Path

_ENTRIES = "2000"
_PIPE, _PREFIX = "flight-", "flight-rank"
READER = "python -m torch.distributed.flight_recorder.fr_trace"


def record(folder: Path, environ: MutableMapping[str, str]) -> None:
    """Let torch record, and listen in `folder`, before the process group is made; what is set already stays."""
    kept = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepy"
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        environ.setdefault(name, _ENTRIES)
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        environ.setdefault(name, str(kept / f"{folder.name}-{_PREFIX}"))
    environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] = str(folder / _PIPE)
    (folder / "flight").write_text(environ["TORCH_FR_DUMP_TEMP_FILE"])


def ask(folder: Path, ranks: Iterable[int], seconds: float = 3.0) -> dict[int, str]:
    """Let ranks write what they recorded, and return their files; none where nothing is recorded, as under gloo."""
    with contextlib.suppress(OSError):
        prefix = (folder / "flight").read_text()
        asked = {rank: f"{prefix}{rank}" for rank in ranks if _trigger(folder / f"{_PIPE}{rank}.pipe")}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(_is_new(path, seconds) for path in asked.values()):
            time.sleep(0.05)
        return {rank: path for rank, path in asked.items() if _is_new(path, 2 * seconds)}
    return {}


def _trigger(pipe: Path) -> bool:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails where nobody listens
    except OSError:
        return False
    with contextlib.suppress(OSError):
        os.write(descriptor, b"1")
    os.close(descriptor)
    return True


def _is_new(path: str, seconds: float) -> bool:
    """Whether a file was written within some seconds, and holds something."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return found.st_size > 0 and time.time() - found.st_mtime < seconds
