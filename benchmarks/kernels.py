"""Each operation's candidates side by side: GB/s, and their share of the bandwidth of a copy in the same run.

    python benchmarks/kernels.py [--quick] [--only NAME] [--json FILE] [--enforce]

Beside what the catalogue offers and this device can run (PyTorch's eager, our Triton kernels, apex, Liger), eager
under torch.compile. GB/s are those of the bytes that the operation cannot avoid to move, whatever a candidate moves,
so that the shares of candidates compare. Forward and backward are timed by themselves: medians, on a GPU with a cold
L2 cache. bf16 on a GPU, fp32 on a CPU. On a GPU the last lines are the rows for `megatron/ops/measured.py`.

--enforce fails where our kernels, at 16384 tokens of 4096 features, move less than they aim at of what a copy moves,
which is 85 % forward and 75 % backward, and 70 % for losses (GPU), or where what `auto` chooses is slower than eager
(CPU: it is eager).
--quick: one size, and no torch.compile on a CPU, where its C++ compiler takes longer than all else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.kernel_works import WORKS, Arguments, Work
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Function, Situation
from megatron.ops.measured import Fastest

AIMED_AT = (16384, 4096)
GPU_SIZES = [(tokens, hidden) for hidden in (768, 1024, 2048, 4096, 8192) for tokens in (2048, 16384, 65536)]
CPU_SIZES = [(512, 768), (2048, 2048)]
COMPILED_AT = (AIMED_AT, (16384, 768), *CPU_SIZES)
"""Compilation takes seconds for each size."""


@dataclass(frozen=True)
class Row:
    """One measurement. forward, backward: GB/s; the shares are of the copy's bandwidth."""

    operation: str
    candidate: str
    tokens: int
    hidden: int
    forward: float
    backward: float
    forward_share: float
    backward_share: float
    milliseconds: float


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.seconds = seconds
        on_gpu = device.type == "cuda"
        self._flush = torch.empty(1 << 28 if on_gpu else 0, dtype=torch.int8, device=device)

    def median(self, call: Callable[[], Any]) -> float:
        """Return the median seconds of a call."""
        for _ in range(3):
            call()
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
            times.append(self._once(call))
        return statistics.median(times)

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        self._flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    def copy_bandwidth(self) -> float:
        """Return the bytes per second that a large copy reads and writes."""
        source = torch.ones(1 << (29 if self.device.type == "cuda" else 25), device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / self.median(lambda: target.copy_(source))


def candidates(operation: str, situation: Situation) -> Iterator[tuple[str, Function]]:
    """Yield what can compute an operation here, by name; say why something on a GPU cannot."""
    for candidate in CATALOGUE[operation].candidates:
        reason = candidate.obstacle(situation)
        if not reason:
            try:
                yield candidate.name, candidate.load()
            except Exception as error:  # an optional library in whatever state it is
                reason = f"{type(error).__name__}: {error}"
        if reason and situation.device.type == "cuda":
            print(f"{operation}: {candidate.name}: {reason}", file=sys.stderr)


def compiled(operation: str) -> Function:
    """Return eager under torch.compile, which forgets what it compiled for other sizes."""
    torch.compiler.reset()
    function: Function = torch.compile(CATALOGUE[operation].candidates[0].load(), dynamic=False)
    return function


def measure(work: Work, name: str, function: Function, size: tuple[int, int], clock: Clock, copy: float) -> Row:
    """Return one candidate's row at (tokens, hidden)."""
    tokens, hidden = size
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    leaves: list[Tensor] = []

    def draw(*shape: int) -> Tensor:
        leaves.append(torch.randn(shape, dtype=dtype, device=clock.device).requires_grad_())
        return leaves[-1]

    arguments: Arguments = work.inputs(tokens, hidden, draw)
    forward, backward = clock.median(lambda: function(*arguments)), 0.0
    value_bytes = work.value_bytes or dtype.itemsize
    rates = [tokens * work.forward(hidden) * value_bytes / forward, 0.0]
    if work.backward is not None:
        result = function(*arguments)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        upstream = [torch.randn_like(output) for output in outputs]
        backward = clock.median(lambda: torch.autograd.grad(outputs, leaves, upstream, True, allow_unused=True))
        rates[1] = tokens * work.backward(hidden) * value_bytes / backward
    return Row(
        work.operation, name, tokens, hidden, rates[0] / 1e9, rates[1] / 1e9, rates[0] / copy, rates[1] / copy,
        (forward + backward) * 1e3,
    )  # fmt: skip


def fitting(
    work: Work, name: str, function: Function, size: tuple[int, int], clock: Clock, copy: float
) -> Iterator[Row]:
    """Yield one candidate's row at (tokens, hidden), or none and a message where it needs more memory than there is."""
    try:
        yield measure(work, name, function, size, clock, copy)
    except torch.OutOfMemoryError:
        print(f"{work.operation}: {name}: no memory for {size[0]} tokens of {size[1]} features", file=sys.stderr)
        torch.cuda.empty_cache()


def report(rows: list[Row]) -> None:
    """Print a table."""
    print(
        f"\n{'operation':16} {'candidate':10} {'tokens':>6} {'hidden':>6}  forward GB/s      backward GB/s      both ms"
    )
    for row in rows:
        rates = f"{row.forward:8.0f} {row.forward_share:6.0%}   {row.backward:8.0f} {row.backward_share:6.0%}"
        print(f"{row.operation:16} {row.candidate:10} {row.tokens:6} {row.hidden:6}  {rates}   {row.milliseconds:9.3f}")


def fastest(rows: list[Row], device_name: str) -> list[Fastest]:
    """Return, at the most tokens measured, the fastest candidate of the catalogue for each operation and width."""
    most = max(row.tokens for row in rows)
    known = [row for row in rows if row.candidate != "compile" and row.tokens == most]
    sizes = sorted({(row.operation, row.hidden) for row in known})
    best = {
        size: min((r for r in known if (r.operation, r.hidden) == size), key=lambda r: r.milliseconds) for size in sizes
    }
    return [Fastest(device_name, operation, hidden, row.candidate) for (operation, hidden), row in best.items()]


def misses(rows: list[Row]) -> list[str]:
    """Return which of our kernels fall short of the aims."""
    ours = [row for row in rows if row.candidate == "triton" and (row.tokens, row.hidden) == AIMED_AT]
    aims = {work.operation: work.aims for work in WORKS}
    return [
        f"{row.operation}: {row.forward_share:.0%} forward, {row.backward_share:.0%} backward"
        for row in ours
        if row.forward_share < aims[row.operation][0] or row.backward_share < aims[row.operation][1]
    ]


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--enforce", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    clock = Clock(device, seconds=0.1 if on_gpu or options.quick else 0.5)
    copy = clock.copy_bandwidth()
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: a copy moves {copy / 1e9:.0f} GB/s", flush=True)
    sizes = (GPU_SIZES if on_gpu else CPU_SIZES) if not options.quick else [AIMED_AT if on_gpu else CPU_SIZES[0]]
    rows: list[Row] = []
    for work in (work for work in WORKS if options.only in work.operation):
        situation = Situation(device, torch.bfloat16, sizes[0][1])
        for label, function in candidates(work.operation, situation):
            rows += [row for size in sizes for row in fitting(work, label, function, size, clock, copy)]
        with_compile = work.compiles and not (options.quick and not on_gpu)
        for size in (size for size in sizes if size in COMPILED_AT and with_compile):
            rows += fitting(work, "compile", compiled(work.operation), size, clock, copy)
    report(rows)
    found = fastest(rows, name) if on_gpu else []
    for row in found:
        print(row)
    if options.json:
        measured = {"device": name, "copy": copy / 1e9, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(measured | {"fastest": [asdict(row) for row in found]}, indent=1))
    short = misses(rows)
    if options.enforce and short:
        raise SystemExit("short of the aims:\n" + "\n".join(short))


if __name__ == "__main__":
    main()
