"""Freed memory that stays: counted by the pages that the system clears, in a process of its own for each case."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron import malloc
from megatron.engine import build
from megatron.launch import worker
from megatron.launch.place import Place
from megatron.launch.worker import decoding_worker
from megatron.malloc import MMAP_BYTES, TRIM_BYTES, keep_freed_memory
from tests.engine import tiny

STEPS = """
import resource, sys
from megatron.malloc import keep_freed_memory
kept = keep_freed_memory(sys.argv[1]), keep_freed_memory(sys.argv[1])
def step():
    blocks = [bytearray(48 * 2**20), bytearray(20 * 2**20)]
    sizes = [len(block) for block in blocks]
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(kept[0] and kept[1], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _pages(device_type: str, **environ: str) -> tuple[bool, int]:
    """Return whether the process was told to keep memory, and the pages that a step had cleared."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", STEPS, device_type], env=bare | environ, capture_output=True, text=True, check=True
    ).stdout.split()
    return found[0] == "True", int(found[1])


def test_a_step_on_a_cpu_asks_the_system_for_nothing() -> None:
    kept, pages = _pages("cpu")
    assert kept
    assert pages < 100


VARIED = """
import random
from megatron.malloc import keep_freed_memory
keep_freed_memory("cpu")
def largest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
draw, before = random.Random(0), largest()
for number in range(120):
    blocks, small = [], []
    while sum(map(len, blocks)) < 48 * 2**20:
        blocks.append(bytearray(draw.randrange(2**16, 8 * 2**20)))
        small.append(bytearray(draw.randrange(600, 2000)))
    if number == 20:
        first = largest() - before
print(first, largest() - before)
"""


def test_steps_of_ever_other_sizes_do_not_grow_without_bound() -> None:
    """56 MiB are in use at most; holes between blocks cost some more, in the first steps and not for ever."""
    found = subprocess.run([sys.executable, "-c", VARIED], capture_output=True, text=True, check=True).stdout.split()
    first, last = map(int, found)
    assert 40 < last < min(112, 1.3 * first)


@pytest.mark.parametrize(
    ("device_type", "environ"),
    [
        ("cuda", {}),
        ("cpu", {"MALLOC_TRIM_THRESHOLD_": "131072"}),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=131072"}),
    ],
)
def test_a_gpus_process_and_a_users_own_limits_stay_as_they_are(device_type: str, environ: dict[str, str]) -> None:
    kept, pages = _pages(device_type, **environ)
    assert not kept
    assert pages > 4000


def _with_libc(monkeypatch: pytest.MonkeyPatch, libc: object) -> None:
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: libc)
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_libc(monkeypatch, SimpleNamespace(mallopt=lambda *_: pytest.fail("of musl or a BSD")))
    assert not keep_freed_memory("cpu")


def test_an_older_glibc_gets_the_largest_limit_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def mallopt(option: int, value: int) -> int:
        told.append((option, value))
        return int(option != -3 or value <= 2**25)

    _with_libc(monkeypatch, SimpleNamespace(mallopt=mallopt, gnu_get_libc_version=None))
    assert keep_freed_memory("cpu")
    assert told == [(-3, MMAP_BYTES[0]), (-3, MMAP_BYTES[1]), (-1, TRIM_BYTES)]


def test_limits_that_are_refused_are_not_half_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def mallopt(option: int, value: int) -> int:
        assert option == -3, "the limit of trimming alone would end glibc's own growth of the other"
        return 0

    _with_libc(monkeypatch, SimpleNamespace(mallopt=mallopt, gnu_get_libc_version=None))
    assert not keep_freed_memory("cpu")


def test_whoever_trains_on_a_cpu_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker before its first tensor, and whoever builds an engine without one."""
    asked = []
    monkeypatch.setattr(worker, "keep_freed_memory", lambda kind: asked.append(("worker", kind)))
    monkeypatch.setattr(build, "keep_freed_memory", lambda kind: asked.append(("engine", kind)))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    decoding_worker(tiny.config(), Place())
    tiny.make_engine(tiny.config())
    assert asked == [("worker", "cpu"), ("engine", "cpu")]
