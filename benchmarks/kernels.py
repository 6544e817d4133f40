"""Each operation's candidates side by side: GB/s, and their share of the bandwidth of a copy in the same run.

    python benchmarks/kernels.py [--quick] [--only NAME] [--limit SECONDS] [--json FILE] [--write] [--enforce]

The candidates are what the catalogue offers and this device can run: PyTorch's eager, our Triton kernels, apex, Liger,
Transformer Engine and torch.compile. GB/s are those of the bytes that the operation cannot avoid to move, whatever a
candidate moves, so that the shares of candidates compare. Forward and backward are timed by themselves: medians, on a
GPU with a cold L2 cache. bf16 on a GPU, fp32 and bf16 on a CPU.

On a GPU the last lines say what was the fastest, and --write puts that into `megatron/ops/measured.json`, by which
`auto` chooses from then on. The sizes that matter most come first: --limit stops after so many seconds.

On a CPU what `auto` runs there is also set beside the same written plainly with PyTorch
(`beside_torch.py`), at 1 and at 2 threads, with the memory of the loss.

--enforce fails where our kernels, at 16384 tokens of 4096 features, move less than they aim at of what a copy moves,
which is 85 % forward and 75 % backward, and 70 % for losses (GPU); or where ours is slower than plain PyTorch by more
than noise, the cross entropy less than 1.5 times as fast, or its memory, together with the projection before it, more
than a third of plain PyTorch's (CPU).
--quick: one size; on a CPU the comparison with plain PyTorch alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import beside_torch
from benchmarks.kernel_works import WORKS, Arguments, Work
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Function, Situation
from megatron.ops.compiled import COMPILE
from megatron.ops.measured import Fastest, write

AIMED_AT = (16384, 4096)
WIDTHS = (4096, 768, 2048, 8192, 1024)
GPU_SIZES = [(tokens, hidden) for tokens in (16384, 2048, 65536) for hidden in WIDTHS]
SELDOM = ("masked_softmax", "grouped_matmul", "selective_scan")
"""No model uses them yet: on a GPU they are measured at the size of the aims only."""

CPU_SIZES = [(512, 768), (2048, 2048)]
COMPILED_AT = (AIMED_AT, (16384, 768))
"""Of a GPU's sizes, those of torch.compile, which takes seconds for each operation and size."""

COMPILE_PAYS = 0.9
"""The share of the next best's time that torch.compile must stay below to be chosen: it compiles at every start."""

MEMORY_AIM = 1 / 3
"""Of plain PyTorch's memory, what ours may take for projection and loss of MEMORY_TOKENS tokens."""

MEMORY_TOKENS = 2048


@dataclass(frozen=True)
class Row:
    """One measurement. forward, backward: GB/s; the shares are of the copy's bandwidth."""

    operation: str
    candidate: str
    dtype: str
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


def candidates(operation: str, situation: Situation, compiled: bool) -> Iterator[tuple[str, Function]]:
    """Yield what can compute an operation here, by name; say why something on a GPU cannot.

    compiled: torch.compile alone; else all but that.
    """
    for candidate in CATALOGUE[operation].candidates:
        if (candidate.name == COMPILE) != compiled:
            continue
        reason = candidate.obstacle(situation)
        if not reason:
            try:
                yield candidate.name, candidate.load()
            except Exception as error:  # an optional library in whatever state it is
                reason = f"{type(error).__name__}: {error}"
        if reason and situation.device.type == "cuda":
            print(f"{operation}: {candidate.name}: {reason}", file=sys.stderr)


def measure(
    work: Work, name: str, function: Function, size: tuple[int, int], clock: Clock, copy: float, dtype: torch.dtype
) -> Row:
    """Return one candidate's row at (tokens, hidden)."""
    tokens, hidden = size
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
        work.operation, name, str(dtype).removeprefix("torch."), tokens, hidden, rates[0] / 1e9, rates[1] / 1e9,
        rates[0] / copy, rates[1] / copy, (forward + backward) * 1e3,
    )  # fmt: skip


def measured_rows(
    works: list[Work], size: tuple[int, int], clock: Clock, copy: float, dtype: torch.dtype, compiled: bool = False
) -> Iterator[Row]:
    """Yield the row of every candidate at a size, or of torch.compile alone; of one that fails here, its message."""
    situation = Situation(clock.device, dtype, size[1])
    for work in works:
        for name, function in candidates(work.operation, situation, compiled):
            try:
                yield measure(work, name, function, size, clock, copy, dtype)
            except Exception as error:  # no memory for this size, or a library or a compiler that does not work here
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                print(f"{work.operation}: {name}: {size[0]} tokens of {size[1]}: {reason}", file=sys.stderr)
                if clock.device.type == "cuda":
                    torch.cuda.empty_cache()


def report(rows: list[Row]) -> None:
    """Print a table."""
    head = f"{'operation':16} {'candidate':18} {'dtype':8} {'tokens':>6} {'hidden':>6}"
    print(f"\n{head}  forward GB/s      backward GB/s      both ms")
    for row in rows:
        what = f"{row.operation:16} {row.candidate:18} {row.dtype:8} {row.tokens:6} {row.hidden:6}"
        rates = f"{row.forward:8.0f} {row.forward_share:6.0%}   {row.backward:8.0f} {row.backward_share:6.0%}"
        print(f"{what}  {rates}   {row.milliseconds:9.3f}")


def fastest(rows: list[Row], device_name: str) -> list[Fastest]:
    """Return the fastest candidate for each operation and width, at the number of tokens that the aims have."""
    known = [row for row in rows if row.tokens == AIMED_AT[0]]
    sizes = sorted({(row.operation, row.hidden) for row in known})
    return [
        Fastest(
            device_name, operation, hidden, best([r for r in known if (r.operation, r.hidden) == (operation, hidden)])
        )
        for operation, hidden in sizes
    ]


def best(rows: list[Row]) -> str:
    """Return the name of the fastest candidate; torch.compile only where it is clearly the fastest."""
    return min(rows, key=lambda row: row.milliseconds / (COMPILE_PAYS if row.candidate == COMPILE else 1)).candidate


def misses(rows: list[Row]) -> list[str]:
    """Return which of our kernels fall short of the aims."""
    ours = [row for row in rows if row.candidate == "triton" and (row.tokens, row.hidden) == AIMED_AT]
    aims = {work.operation: work.aims for work in WORKS}
    return [
        f"{row.operation}: {row.forward_share:.0%} forward, {row.backward_share:.0%} backward"
        for row in ours
        if row.forward_share < aims[row.operation][0] or row.backward_share < aims[row.operation][1]
    ]


@dataclass
class Measured:
    """Everything of a run. compared, memory: of a CPU."""

    device: str
    copy: float
    rows: list[Row] = field(default_factory=list)
    fastest: list[Fastest] = field(default_factory=list)
    compared: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def save(self, path: Path | None) -> None:
        """Write it as JSON, where that is wanted."""
        if path is not None:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def gpu_passes(quick: bool) -> list[tuple[tuple[int, int], bool]]:
    """Return the sizes in the order of their weight, each with whether torch.compile is measured or all else."""
    first, rest = GPU_SIZES[: len(COMPILED_AT)], GPU_SIZES[len(COMPILED_AT) :]
    passes = [(size, compiled) for compiled in (False, True) for size in first] + [(size, False) for size in rest]
    return [each for each in passes if not quick or each[0] == GPU_SIZES[0]]


def on_a_gpu(options: argparse.Namespace, works: list[Work], clock: Clock) -> Measured:
    """Measure size by size until the limit."""
    copy = clock.copy_bandwidth()
    measured = Measured(torch.cuda.get_device_name(clock.device), copy / 1e9)
    print(f"{measured.device}: a copy moves {measured.copy:.0f} GB/s", flush=True)
    begin = time.perf_counter()
    for number, (size, compiled) in enumerate(gpu_passes(options.quick)):
        if number and options.limit and time.perf_counter() - begin > options.limit:
            print(f"{options.limit} s are over: nothing of {size[0]} tokens of {size[1]} and what comes after it")
            break
        here = [work for work in works if number == 0 or work.operation not in SELDOM]
        for work in here:
            if number and options.limit and time.perf_counter() - begin > options.limit:
                break  # between operations: one that was measured in part would have a false winner
            measured.rows += measured_rows([work], size, clock, copy, torch.bfloat16, compiled)
        measured.fastest = fastest(measured.rows, measured.device)
        measured.save(options.json)
        if options.write:  # after each size: a run that is stopped has chosen by what it had
            write(measured.fastest)
    report(measured.rows)
    for found in measured.fastest:
        print(found)
    measured.misses = misses(measured.rows)
    return measured


def on_a_cpu(options: argparse.Namespace, works: list[Work], clock: Clock) -> Measured:
    """Compare with plain PyTorch, and, unless --quick, measure the candidates."""
    threads = torch.get_num_threads()
    copy = clock.copy_bandwidth()
    measured = Measured(f"CPU, {threads} threads", copy / 1e9)
    print(f"{measured.device}: a copy moves {measured.copy:.0f} GB/s; load {os.getloadavg()[0]:.1f}", flush=True)
    for each in [threads] if options.quick else sorted({1, threads}):
        compared = beside_torch.compare_all(*CPU_SIZES[0], each, options.only)
        measured.compared += [
            asdict(row) | {"ratio": row.ratio, "ratio_of_processor_time": row.ratio_of_processor_time}
            for row in compared
        ]
        measured.misses += [row.miss() for row in compared if row.is_short]
    torch.set_num_threads(threads)
    if options.only in "linear + cross_entropy":
        for dtype in ("float32", "bfloat16"):
            ours, plain = (beside_torch.grown(side, dtype, MEMORY_TOKENS) for side in ("ours", "plain"))
            measured.memory[dtype] = {"ours": ours, "plain": plain, "tokens": MEMORY_TOKENS}
            text = f"{ours / 2**20:.0f} MiB, PyTorch {plain / 2**20:.0f} MiB, {ours / plain:.2f} of it"
            print(f"memory of linear + cross_entropy, {dtype}, {MEMORY_TOKENS} tokens: ours {text}", flush=True)
            if ours > plain * MEMORY_AIM:
                measured.misses.append(f"memory of linear + cross_entropy, {dtype}: {text}, at most {MEMORY_AIM:.2f}")
    measured.save(options.json)
    if not options.quick:
        for dtype in (torch.float32, torch.bfloat16):
            for size in CPU_SIZES:
                for compiled in (False, True):
                    measured.rows += measured_rows(works, size, clock, copy, dtype, compiled)
        report(measured.rows)
    return measured


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds of measuring on a GPU; 0: no limit")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put what was the fastest into megatron/ops/measured.json")
    parser.add_argument("--enforce", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    clock = Clock(torch.device("cuda" if on_gpu else "cpu"), seconds=0.1 if on_gpu or options.quick else 0.3)
    works = [work for work in WORKS if options.only in work.operation]
    measured = (on_a_gpu if on_gpu else on_a_cpu)(options, works, clock)
    measured.save(options.json)
    if options.write:
        print(
            "written to megatron/ops/measured.json" if on_gpu else "--write: `auto` follows measurements on GPUs only"
        )
    for miss in measured.misses:
        print(f"{'MISSED' if options.enforce else 'short of the aim'}: {miss}")
    return int(bool(options.enforce and measured.misses))


if __name__ == "__main__":
    sys.exit(main())
