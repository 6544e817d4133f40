"""A side's turn in `train.py`: a process of its own that builds the side, steps it, and says what that took."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_sizes import Size

GIB = 2**30

Step = Callable[[], Any]
"""Does one optimizer step, and returns what float() turns into the loss before it."""

Make = Callable[[Size, str, torch.device], Step]
"""(size, precision, device) -> the step of a side."""


@dataclass(frozen=True)
class Turn:
    """What a turn found. losses: of all steps, from the first. seconds, processor: of each counted step. memory: GiB.

    error: instead of all else.
    """

    losses: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    processor: tuple[float, ...] = ()
    memory: float = 0.0
    launches: int = 0
    syncs: int = 0
    error: str = ""


def take_turn(make: Make, size: Size, precision: str, plan: tuple[int, int, bool]) -> Turn:
    """Return the turn of a side in a process of its own. plan: steps to warm up, steps to count, whether to profile."""
    turn = forked(_turn, make, size, precision, plan)
    return turn if isinstance(turn, Turn) else Turn(error=str(turn))


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), computed by another process, or a str that says how it failed.

    This process itself must compute nothing: threads of a matrix product would not survive in those that it forks.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, *arguments))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        process.join()
        found = f"its process ended with {process.exitcode}"
    process.join()
    return found


def _has_gpu() -> bool:
    """Return whether there is a GPU. Another process looks: CUDA that this one had started would fail in its forks."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    return forked(torch.cuda.is_available) is True


def _send(connection: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        connection.send(function(*arguments))
    except Exception as error:  # a side that cannot run costs its own row only
        lines = str(error).strip().splitlines() or [""]
        connection.send(f"{type(error).__name__}: {lines[0]}")


ON_GPU = _has_gpu()
os.environ.setdefault("DS_ACCELERATOR", "cuda" if ON_GPU else "cpu")  # DeepSpeed reads it when it is imported


def _turn(make: Make, size: Size, precision: str, plan: tuple[int, int, bool]) -> Turn:
    warm, number, profiled = plan
    device = torch.device("cuda" if ON_GPU else "cpu")
    before = _memory("VmRSS")
    step = make(size, precision, device)
    _forget_peak()
    early = [float(step()) for _ in range(warm)]
    seconds, processor, late = _timed(step, number)
    memory = torch.cuda.max_memory_allocated() if ON_GPU else _memory("VmHWM") - before
    launches, syncs = _counted(step) if profiled else (0, 0)
    return Turn((*early, *late), seconds, processor, memory / GIB, launches, syncs)


def _timed(step: Step, number: int) -> tuple[tuple[float, ...], tuple[float, ...], list[float]]:
    """Return each step's seconds, on the device's clock where it has one, those of the processor, and the losses."""
    marks, busy = [_mark()], [time.process_time()]
    results = []
    for _ in range(number):
        results.append(step())
        marks.append(_mark())
        busy.append(time.process_time())
    if ON_GPU:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    else:
        seconds = [b - a for a, b in pairwise(marks)]
    losses = [float(result) for result in results]
    if any(loss != loss for loss in losses):
        raise ValueError("a loss is not a number")
    return tuple(seconds), tuple(b - a for a, b in pairwise(busy)), losses


def _mark() -> Any:
    """Return now: seconds, or an event on the GPU's clock."""
    if not ON_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _counted(step: Step) -> tuple[int, int]:
    """Return the kernels (on a CPU: operators) that a step launches, and how often the host waits for the device."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    try:
        with profile(activities=activities) as record:
            step()
    except RuntimeError as error:  # of a profiler that may not look at this GPU: the times are measured all the same
        print(f"not counted: {error}", file=sys.stderr, flush=True)
        return 0, 0
    names = [event.name for event in record.events()]
    reads = sum(name == "aten::_local_scalar_dense" for name in names)
    if not ON_GPU:
        return sum(name.startswith("aten::") for name in names), reads
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names)
    return launches, sum(
        name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize") for name in names
    )


def _forget_peak() -> None:
    """Begin to measure the peak of memory anew."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _memory(kind: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), 0)
