"""Keeps freed memory in the process: on a CPU each step of training asks for the blocks that the one before has freed.

glibc takes a block beyond 32 MiB from the system and gives it back at once, and the top of its heap soon after. The
system clears every page of what comes anew, 1 to 2 microseconds for 4 KiB: at 19M parameters 36,000 to 100,000 pages
a step, 3 to 5 % of its time. With `keep_freed_memory` it is a handful of pages, and the peak is the same.

Only glibc is told, by `mallopt`; under another libc, or where another allocator is loaded before it, nothing changes.
PyTorch's allocator of a GPU keeps memory by itself. Source: mallopt(3), and glibc's malloc/malloc.c for the limits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""

MMAP_BYTES = (2**30, 2**25)
"""Blocks below are parts of the heap. Before 2.35 glibc refuses more than the second."""

TRIM_BYTES = 2**31 - 1
"""Free memory at the heap's end that goes back to the system: the most that an int says."""

_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_USERS_TUNABLES = ("glibc.malloc.mmap_", "glibc.malloc.trim_threshold", "glibc.malloc.top_pad")

Mallopt = Callable[[int, int], int]


def keep_freed_memory(device_type: str) -> bool:
    """Let this process keep what it frees, from now on; return whether it does.

    device_type: where the model is trained: only "cpu" needs it. Who has set glibc's limits in the environment, as
    MALLOC_TRIM_THRESHOLD_ or in GLIBC_TUNABLES, has them. Doing it twice is harmless.
    """
    if device_type != "cpu" or _is_users():
        return False
    mallopt = _mallopt()
    if mallopt is None:
        return False
    # A refused limit would leave the next one at 128 KiB for ever, since any setting ends glibc's own growth of it.
    return any(mallopt(_MMAP_THRESHOLD, size) for size in MMAP_BYTES) and bool(mallopt(_TRIM_THRESHOLD, TRIM_BYTES))


def _is_users() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in _USERS) or any(name in tunables for name in _USERS_TUNABLES)


def _mallopt() -> Mallopt | None:
    """Return glibc's mallopt, or None in a process with another libc."""
    try:
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):
        return None
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return mallopt
