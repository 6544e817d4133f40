"""The memory of this machine, or of the container it runs in, and what this process has of it."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")


def total_memory() -> int:
    """Return the bytes of memory that processes may use: the machine's, or the container's limit if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_number(_CGROUP / "memory.max")])


def available_memory() -> int:
    """Return the bytes that processes may still take: by /proc/meminfo, and by the container's limit."""
    machine = _field(Path("/proc/meminfo"), "MemAvailable") or total_memory()
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return max(0, min([machine, *(most - now for most, now in zip(limit, used, strict=False))]))


def resident_memory() -> int:
    """Return the bytes of memory that this process has in use."""
    return _field(_PROCESS / "status", "VmRSS")


def peak_memory() -> int:
    """Return the most bytes that this process had in use, since its start or the last `forget_peak`."""
    return _field(_PROCESS / "status", "VmHWM")


def forget_peak() -> None:
    """Let `peak_memory` begin anew, where the system can: proc(5), clear_refs."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def _field(path: Path, name: str) -> int:
    """Return the bytes of a line `name: 123 kB`; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _number(path: Path) -> list[int]:
    """Return the number that a file holds, in a list; an empty one where it holds none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []
