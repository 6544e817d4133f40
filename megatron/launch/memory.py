"""How much memory this machine, or the container it runs in, has."""

from __future__ import annotations

import os
from pathlib import Path


def total_memory() -> int:
    """Return the bytes of memory that processes may use: the machine's, or the container's limit if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        total = min(total, int(limit.read_text()))
    return total
