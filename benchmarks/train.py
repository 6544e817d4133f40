"""Training tokens per second, beside what others reach with the same weights.

    python benchmarks/train.py [--quick] [--size NAME ...] [--side NAME ...] [--json FILE] [--enforce]

On a GPU 125M to 6.9B in bf16 with 2048 tokens to a sequence; without one 19M and 125M in fp32 and bf16, 512 and 256
tokens, on OMP_NUM_THREADS (2) cores. `train_sides.py` says what the sides are and `train_sizes.py` has the shapes.
The sides take turns, and each turn is a process that is alone: beside another process, even an idle one, a side that
asks the system for memory in each step falls by a fifth on a CPU. The first steps of a turn are not counted: they
compile and warm up. All sides begin from the same weights; their losses must be equal, before any update and
after some: where one's are not, its row says so, and the command fails.

    tokens/s      of the median step of all turns
    MFU           share of the peak, in both conventions: attention counted in full, and half of it, as causal. The peak
                  is the data sheet's on a GPU, and on a CPU the best matrix product measured in the same run
    memory        GiB: on a GPU the allocator's peak; on a CPU the growth of the process
    launches, syncs   of one step: kernels (on a CPU operators), and waits of the host for a value of the device

--quick: the first size (GPU: three), ours beside Hugging Face's eager, fewer steps, and on a CPU 2 sequences.
--enforce fails, a line for each miss, where ours is below 1.3 times the fastest other (CPU), takes more memory than
another (CPU), or is below the aimed tokens/s (H200), or where a DeepSpeed engine takes over 1.1 times as long as ours.
"pure" sides are shown, and not judged: they train something else. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the start scripts set it, for all sides
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # who asks for a GPU here starts no CUDA, which turns need
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.train_sides import SIDES
from benchmarks.train_sizes import CPU_SIZES, GPU_SIZES, VOCABULARY, Size, settings
from benchmarks.train_turns import ON_GPU, Turn, forked, take_turn
from megatron.config.resolve import resolve
from megatron.model.accounting import flops_per_token
from megatron.model.build import DTYPES
from megatron.ops.linear import linear
from megatron.planning.speed import GPUS

AIM = 1.3
OURS, DEEPSPEED, PURE = "ours", "deepspeed", "pure"
DEEPSPEED_AIM = 1.1
"""A DeepSpeed engine may take so many times as long as ours."""

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Largest difference of the losses before any update, relative; after two 10 times as much."""

OWN_TOLERANCE = {"litgpt pure": {"fp32": 1e-5, "bf16": 1e-2}}
"""LitGPT's loss is itself a bf16 number there."""

QUICK = {True: (OURS, "ours fused", "hf", "ours compiled", "ours recorded"), False: (OURS, "hf")}
LATE = {"ours compiled", "ours recorded"}
"""Of --quick on a GPU, what is measured when all sizes have been without it: a limit of time costs the least there."""
GPU_ONLY = ("ours fused", "ours recorded")


@dataclass(frozen=True)
class Row:
    """One side at one size. ratio, processor_ratio: the first side's, which is ours, beside it, of the median seconds.
    differs: in which way it computes another function than that one; "" where it does not."""

    size: str
    precision: str
    side: str
    tokens_per_second: float
    mfu_full: float
    mfu_causal: float
    memory: float
    launches: int
    syncs: int
    ratio: float
    processor_ratio: float
    seconds: tuple[float, ...]
    differs: str = ""


def main() -> int:
    """Measure, print, and judge."""
    options = _options()
    device = _device_name()
    peaks = {precision: _peak(device, precision) for precision in (("bf16",) if ON_GPU else ("fp32", "bf16"))}
    print(f"{device}: {', '.join(f'{peak / 1e12:.3g} TFLOP/s in {name}' for name, peak in peaks.items())}", flush=True)
    rows: list[Row] = []
    known: dict[tuple[str, str], dict[str, list[Turn]]] = {}
    for sides in _passes(options):
        for size in _sizes(options):
            for precision, peak in peaks.items():
                turns = known.setdefault((size.name, precision), {})
                rows += _measured(size, precision, sides, options.quick, peak, turns)
                if options.json:  # after each, so that a run that is stopped keeps what it has
                    found = {"device": device, "peaks": peaks, "rows": [asdict(row) for row in rows]}
                    options.json.write_text(json.dumps(found, indent=1))
    missed = misses(rows, _sizes(options), device) if options.enforce else []
    wrong = [f"{row.size} {row.precision} {row.side}: {row.differs}" for row in rows if row.differs]
    for line in (*wrong, *missed):
        print(line, file=sys.stderr)
    return int(bool(missed or wrong or not rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 50 seconds on 2 cores")
    names = [size.name for size in (GPU_SIZES if ON_GPU else CPU_SIZES)]
    parser.add_argument("--size", nargs="+", choices=names, help="only these models")
    parser.add_argument("--side", nargs="+", choices=list(SIDES), help="only these sides, beside ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    parser.add_argument("--enforce", action="store_true", help="exit 1 where an aim is missed")
    return parser.parse_args()


def _sizes(options: argparse.Namespace) -> list[Size]:
    sizes = list(GPU_SIZES if ON_GPU else CPU_SIZES)
    if options.size:
        sizes = [size for size in sizes if size.name in options.size]
    elif options.quick:
        sizes = sizes[: 3 if ON_GPU else 1]
    return [replace(size, rows=2) for size in sizes] if options.quick and not ON_GPU else sizes


def _passes(options: argparse.Namespace) -> list[list[str]]:
    """Return the sides, those that are measured at all sizes before the next ones are."""
    sides = _sides(options)
    late = [side for side in sides if side in LATE] if options.quick and ON_GPU and not options.side else []
    early = [side for side in sides if side not in late]
    return [early, late] if late else [early]


def _sides(options: argparse.Namespace) -> list[str]:
    if options.side:
        return [OURS, *(side for side in options.side if side != OURS)]
    if options.quick:
        return list(QUICK[ON_GPU])
    return [side for side in SIDES if ON_GPU or side not in GPU_ONLY]


def _measured(
    size: Size, precision: str, sides: Sequence[str], quick: bool, peak: float, known: dict[str, list[Turn]]
) -> list[Row]:
    """Return the rows of one size after printing them. known: the turns of sides that were measured before it; those
    that ran are added. The first of them is what the others are beside: ours, unless that did not run."""
    sides = [side for side in sides if PURE not in side or precision == "bf16"]
    warm, steps, rounds = (1, 2, 1) if quick and not ON_GPU else (3, 10, 1) if ON_GPU else (1, 4, 3)
    turns: dict[str, list[Turn]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            if not any(turn.error for turn in turns[side]):
                plan = (warm + side.endswith(("compiled", "recorded")), steps, number == 0)
                turns[side].append(take_turn(SIDES[side], size, precision, plan))
                if turns[side][-1].error:
                    print(f"{size.name} {precision} {side}: {turns[side][-1].error}", file=sys.stderr, flush=True)
    good = {side: found for side, found in turns.items() if not any(turn.error for turn in found)}
    known.update(good)
    first = known[next(iter(known))] if known else []
    rows = [_row(size, precision, side, found, first, peak) for side, found in good.items()]
    if rows:
        _print(rows)
    return rows


def _row(size: Size, precision: str, side: str, turns: list[Turn], ours: list[Turn], peak: float) -> Row:
    median, ours_median = (statistics.median(t for turn in each for t in turn.seconds) for each in (turns, ours))
    busy, ours_busy = (statistics.median(t for turn in each for t in turn.processor) for each in (turns, ours))
    rate = size.rows * size.length / median
    model = resolve(settings(size, precision, ON_GPU)).model
    full, causal = (flops_per_token(model, VOCABULARY, causal) * rate / peak for causal in (False, True))
    return Row(
        size.name, precision, side, round(rate, 1), round(full, 4), round(causal, 4),
        round(max(turn.memory for turn in turns), 3), turns[0].launches, turns[0].syncs,
        round(median / ours_median, 3), round(busy / ours_busy, 3),
        tuple(round(t, 4) for turn in turns for t in turn.seconds),
        _difference(side, precision, turns[0].losses, ours[0].losses),
    )  # fmt: skip


def _difference(side: str, precision: str, losses: Sequence[float], ours: Sequence[float]) -> str:
    """Return how a side's losses are not ours, or ""."""
    tolerance = OWN_TOLERANCE.get(side, TOLERANCE)[precision]
    for when, step, factor in (("before any update", 0, 1), ("after two updates", 2, 10)):
        if not abs(losses[step] - ours[step]) <= factor * tolerance * abs(ours[step]):
            return f"it computes another function: {when} its loss is {losses[step]}, ours {ours[step]}"
    return ""


def _print(rows: Sequence[Row]) -> None:
    head = rows[0]
    print(
        f"\n{head.size} {head.precision:14} tokens/s  MFU full causal  memory GiB  launches  syncs  ours is", flush=True
    )
    for row in rows:
        share = f"{row.mfu_full:8.1%} {row.mfu_causal:6.1%}"
        times = row.differs or (
            "" if row.side == OURS else f"{row.ratio:.2f} times as fast ({row.processor_ratio:.2f} by processor time)"
        )
        line = (
            f"  {row.side:17} {row.tokens_per_second:9,.0f} {share} {row.memory:11.2f} {row.launches:9} {row.syncs:6}"
        )
        print(f"{line}  {times}", flush=True)


def misses(rows: Sequence[Row], sizes: Sequence[Size], device: str) -> list[str]:
    """Return a line for each aim that was missed."""
    found: list[str] = []
    for size in sizes:
        for precision in ("fp32", "bf16"):
            here = {row.side: row for row in rows if (row.size, row.precision) == (size.name, precision)}
            if here:
                found += [f"{size.name} {precision}: {miss}" for miss in _missed(here, size, device)]
    return found


def _missed(rows: dict[str, Row], size: Size, device: str) -> list[str]:
    found: list[str] = []
    if OURS not in rows:
        return ["ours did not run"]
    ours = rows[OURS]
    if "H200" in device and ours.tokens_per_second < size.aim:
        found.append(f"{ours.tokens_per_second:,.0f} tokens/s, the aim is {size.aim:,.0f}")
    known = (OURS, DEEPSPEED)
    others = [row for side, row in rows.items() if not side.startswith(known) and PURE not in side]
    if not ON_GPU and others:
        best = min(others, key=lambda row: row.ratio)
        if best.ratio < AIM:
            found.append(f"ours is {best.ratio:.2f} times as fast as {best.side}, the aim is {AIM}")
        least = min(others, key=lambda row: row.memory)
        if ours.memory > least.memory:
            found.append(f"ours takes {ours.memory:.2f} GiB, {least.side} {least.memory:.2f}")
    theirs = [row for side, row in rows.items() if side.startswith(DEEPSPEED)]
    return found + [
        f"DeepSpeed's engine takes {row.ratio:.2f} times as long ({row.side}), the aim is {DEEPSPEED_AIM}"
        for row in theirs
        if row.ratio > DEEPSPEED_AIM
    ]


def _device_name() -> str:
    if not ON_GPU:
        return f"CPU, {os.environ['OMP_NUM_THREADS']} threads"
    return str(forked(torch.cuda.get_device_name, 0))


def _peak(device: str, precision: str) -> float:
    """Return the FLOP/s that MFU is a share of."""
    known = [gpu for gpu in GPUS.values() if gpu.name in device]
    if ON_GPU and known:
        return known[0].peak * 1e12
    if ON_GPU:
        print(f"the peak of a {device} is not known, so no MFU is: add it to megatron/planning/speed.py", flush=True)
        return math.inf
    return float(forked(_product_rate, DTYPES[precision]))


def _product_rate(dtype: torch.dtype) -> float:
    """Return the best FLOP/s of a large product, by whichever library is faster."""
    side, times = 2048, []
    left, right = (torch.randn(side, side, dtype=dtype) for _ in range(2))
    for product in (torch.mm, linear):
        for _ in range(6):
            begin = time.perf_counter()
            product(left, right)
            times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times)


if __name__ == "__main__":
    sys.exit(main())
