"""Attention's back ends side by side: TFLOP/s of the pairs of tokens that are seen, forward and backward, and memory.

    python benchmarks/attention.py [--quick] [--json FILE] [--write] [--enforce] [--tiles]

Each shape is measured causal, within a window and over documents, with every back end that can compute it there; those
that cannot are named with the reason. FLOPs are 4 d of each visible pair and head forward and 10 d backward, whatever a
back end computes besides: one that masks what it could skip has less. bf16 on a GPU, where the clock is that of
`kernels.py`; fp32 on a CPU, where the two sides take turns and beside ours stands PyTorch's own function with a mask
made beforehand. On a GPU the last lines are the rows for `megatron/ops/measured.json`,
where --write puts them: `auto` chooses from then on.

--enforce fails where what `auto` takes needs more than 1.05 times the time of the fastest back end (GPU), or of
PyTorch's function (CPU).
--quick: one length.
--tiles: on a GPU, instead of all that, our kernel with other tiles than those of `megatron/ops/triton/attention.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Clock
from megatron.ops.attention_operation import attention_operation
from megatron.ops.choice import Situation, choose
from megatron.ops.measured import Fastest, fastest, write
from megatron.ops.sight import Sight

WITHIN = 1.05
KINDS: dict[str, tuple[str, ...]] = {"causal": (), "window": ("window",), "documents": ("documents",)}


@dataclass(frozen=True)
class Shape:
    """rows of `length` tokens, of `heads` heads of `dim` features."""

    rows: int
    length: int
    heads: int
    dim: int


GPU_SHAPES = [Shape(16384 // length, length, 2560 // dim, dim) for dim in (64, 80, 128) for length in (2048, 8192)]
CPU_SHAPES = [Shape(2, 512, 8, 64), Shape(1, 2048, 4, 64)]


@dataclass(frozen=True)
class Row:
    """One measurement. forward, backward: TFLOP/s. mebibytes: at the most, beyond the inputs; 0 on a CPU."""

    shape: Shape
    kind: str
    backend: str
    forward: float
    backward: float
    milliseconds: float
    mebibytes: float = 0.0


def sight_of(kind: str, shape: Shape, device: torch.device) -> Sight:
    """Return a window of 256 tokens (a quarter of a shorter row), or documents of a sixth to a half of a row."""
    window = min(256, shape.length // 4) if kind == "window" else None
    columns = torch.arange(shape.length, device=device)
    ends = torch.tensor([shape.length // 2, shape.length * 5 // 6], device=device)
    segments = torch.bucketize(columns, ends, right=True).expand(shape.rows, -1).contiguous()
    return Sight(shape.dim**-0.5, window, segments=segments if kind == "documents" else None)


def visible_pairs(sight: Sight, shape: Shape) -> int:
    """Return the pairs of a query and a key that it sees, in all rows."""
    bounds = sight.bounds(
        shape.length, shape.length, torch.device("cpu") if sight.segments is None else sight.segments.device
    )
    return int((bounds.last - bounds.first + 1).sum()) * (1 if len(bounds.first) > 1 else shape.rows)


def draw(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key, value and upstream, [b, n, s, d] that lie as [b, s, n, d]."""
    sizes = (shape.rows, shape.length, shape.heads, shape.dim)
    tensors = [torch.randn(sizes, dtype=dtype, device=device).transpose(1, 2) for _ in range(4)]
    return [*(each.requires_grad_() for each in tensors[:3]), tensors[3]]


def backends(kind: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Yield what can compute it here; say why something else cannot."""
    situation = Situation(device, dtype, shape.dim, shape.length)
    heads = draw(Shape(1, 32, 1, shape.dim), device, dtype)
    for candidate in attention_operation(KINDS[kind]).candidates:
        reason = candidate.obstacle(situation)
        if not reason:
            try:
                backend = candidate.load()
                reason = backend.lacks(heads[0], heads[1], sight_of(kind, Shape(1, 32, 1, 8), device), 0.0)
            except Exception as error:  # an optional library in whatever state it is
                reason = f"{type(error).__name__}: {error}"
        if not reason:
            yield candidate.name, backend
        else:
            print(f"{kind}, {shape.dim} features: not {candidate.name}: {reason}", file=sys.stderr)


def on_a_gpu(shapes: list[Shape], device: torch.device, keep: Callable[[list[Row]], None]) -> list[Row]:
    """Measure every back end. keep: is given the rows so far after each shape."""
    clock, rows = Clock(device, seconds=0.05), []
    for shape in shapes:
        for kind in KINDS:
            tensors, sight = draw(shape, device, torch.bfloat16), sight_of(kind, shape, device)
            for name, backend in backends(kind, shape, device, torch.bfloat16):
                try:
                    rows.append(measured(name, backend, kind, shape, sight, tensors, clock))
                except Exception as error:  # of a compiler or an optional library: the others go on
                    print(f"{kind}, {shape}: not {name}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
                    torch.cuda.empty_cache()
        keep(rows)
    return rows


def measured(
    name: str, backend: Any, kind: str, shape: Shape, sight: Sight, tensors: list[Tensor], clock: Clock
) -> Row:
    """Return a back end's row."""
    *heads, upstream = tensors
    torch.cuda.reset_peak_memory_stats(clock.device)
    before = torch.cuda.memory_allocated(clock.device)
    output = backend(*heads, sight)
    torch.autograd.grad(output, heads, upstream, retain_graph=True)
    memory = torch.cuda.max_memory_allocated(clock.device) - before
    forward = clock.median(lambda: backend(*heads, sight))
    backward = clock.median(lambda: torch.autograd.grad(output, heads, upstream, retain_graph=True))
    return row(kind, shape, name, sight, forward, backward, memory)


def row(kind: str, shape: Shape, name: str, sight: Sight, forward: float, backward: float, memory: int = 0) -> Row:
    """Return the row of seconds forward and backward."""
    operations = 4 * shape.dim * shape.heads * visible_pairs(sight, shape) / 1e12
    seconds = (forward + backward) * 1e3
    return Row(shape, kind, name, operations / forward, 2.5 * operations / backward, seconds, memory / 2**20)


def on_a_cpu(shapes: list[Shape], seconds: float) -> list[Row]:
    """Measure what `auto` takes there, and PyTorch's function."""
    device, rows = torch.device("cpu"), []
    for shape in shapes:
        for kind in KINDS:
            *heads, upstream = draw(shape, device, torch.float32)
            sight = sight_of(kind, shape, device)
            mask = None if kind == "causal" else sight.mask(shape.length, shape.length, device)
            ours = attention_operation(KINDS[kind]).candidates[0].load()
            flags = {"attn_mask": mask, "is_causal": mask is None, "scale": sight.scale}
            sides: dict[str, Callable[[], Tensor]] = {
                "sdpa": partial(ours, *heads, sight),
                "torch": partial(F.scaled_dot_product_attention, *heads, **flags),
            }
            times = take_turns(sides, heads, upstream, seconds)
            rows += [row(kind, shape, name, sight, *found) for name, found in times.items()]
    return rows


def take_turns(
    sides: dict[str, Callable[[], Tensor]], heads: list[Tensor], upstream: Tensor, seconds: float
) -> dict[str, tuple[float, float]]:
    """Return the least seconds of each side forward and backward, round by round: other work on the cores only adds."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    end, number = time.perf_counter() + seconds, 0
    while number < 6 or time.perf_counter() < end:
        for name, side in sides.items():
            begin = time.perf_counter()
            output = side()
            middle = time.perf_counter()
            torch.autograd.grad(output, heads, upstream)
            if number:
                found[name].append((middle - begin, time.perf_counter() - middle))
        number += 1
    return {name: (min(each[0] for each in times), min(each[1] for each in times)) for name, times in found.items()}


def report(rows: list[Row]) -> None:
    """Print a table."""
    names = f"{'rows':>4} {'tokens':>6} {'heads':>5} {'dim':>4} {'kind':9} {'back end':9}"
    print(f"\n{names}  forward backward TFLOP/s   both ms    MiB")
    for each in rows:
        shape = each.shape
        size = f"{shape.rows:4} {shape.length:6} {shape.heads:5} {shape.dim:4} {each.kind:9} {each.backend:9}"
        print(f"{size} {each.forward:8.3f} {each.backward:8.3f} {each.milliseconds:17.3f} {each.mebibytes:6.0f}")


def fastest_of(rows: list[Row], device_name: str) -> list[Fastest]:
    """Return the fastest back end of each head dim, length and kind."""
    best: dict[tuple[str, Shape], Row] = {}
    for each in rows:
        key = (each.kind, each.shape)
        best[key] = min(best.get(key, each), each, key=lambda one: one.milliseconds)
    return [
        Fastest(device_name, attention_operation(KINDS[kind]).name, shape.dim, found.backend, shape.length)
        for (kind, shape), found in best.items()
    ]


def misses(rows: list[Row], device: torch.device) -> list[str]:
    """Return where what `auto` takes is not among the fastest."""
    missed = []
    for kind, shape in dict.fromkeys((each.kind, each.shape) for each in rows):
        times = {each.backend: each.milliseconds for each in rows if (each.kind, each.shape) == (kind, shape)}
        taken = "sdpa"
        if device.type == "cuda":
            operation = attention_operation(KINDS[kind])
            situation = Situation(device, torch.bfloat16, shape.dim, shape.length)
            taken = (
                choose({operation.name: "auto"}, situation, {operation.name: operation}, fastest).choices[0].candidate
            )
        best = min(times, key=lambda name: times[name])
        if taken not in times:
            missed.append(f"{kind}, {shape}: auto takes {taken}, which could not be measured")
        elif times[taken] > WITHIN * times[best]:
            share = times[taken] / times[best]
            missed.append(f"{kind}, {shape}: auto takes {taken}, which needs {share:.2f} times the time of {best}")
    return missed


TILES: dict[str, tuple[int, list[tuple[int, int, int, int]]]] = {
    "forward": (
        0,
        [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ),
    "dq": (1, [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3), (64, 128, 8, 2)]),
    "dk and dv": (
        2,
        [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3)],
    ),
}
"""Queries and keys of a block, warps and stages, for the passes of `_tile`."""


def try_tiles(shapes: list[Shape], device: torch.device) -> None:
    """Print the milliseconds, forward and backward, of our kernel with one pass in other tiles, and in its own."""
    ours = importlib.import_module("megatron.ops.triton.attention")
    chosen, clock = ours._tile, Clock(device, seconds=0.05)
    for shape in shapes:
        tensors, sight = draw(shape, device, torch.bfloat16), sight_of("causal", shape, device)
        for name, (number, tiles) in TILES.items():
            own = chosen(number, shape.dim, torch.bfloat16, ours.architecture(device))
            for tile in dict.fromkeys([own, *tiles]):
                ours._tile = lambda asked, *rest, n=number, t=tile: t if asked == n else chosen(asked, *rest)
                try:
                    found = measured(name, ours.BACKEND, "causal", shape, sight, tensors, clock)
                    text = f"{found.forward:8.1f} {found.backward:8.1f} TFLOP/s"
                except Exception as error:  # of the compiler, or of a launch with too much shared memory
                    text = " ".join(str(error).split())[:100]
                print(f"{shape.length:6} {shape.dim:4} {name:9} {tile!s:20} {text}{'  (its own)' * (tile == own)}")
        ours._tile = chosen


def keep_rows(rows: list[Row], name: str, on_gpu: bool, path: Path | None, writes: bool) -> list[Fastest]:
    """Write what was measured so far wherever that is wanted; return what was the fastest on a GPU."""
    found = fastest_of(rows, name) if on_gpu else []
    if path:
        measurements = {"device": name, "rows": [asdict(each) for each in rows]}
        path.write_text(json.dumps(measurements | {"fastest": [asdict(each) for each in found]}, indent=1))
    if writes and found:
        write(found)
    return found


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--enforce", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(name, flush=True)
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    if options.quick:
        shapes = [shape for shape in shapes if shape.length == shapes[0].length]
    if options.tiles:
        try_tiles(shapes, device)
        return
    keep = partial(keep_rows, name=name, on_gpu=on_gpu, path=options.json, writes=options.write)
    rows = on_a_gpu(shapes, device, keep) if on_gpu else on_a_cpu(shapes, 1.0 if options.quick else 4.0)
    report(rows)
    for each in keep(rows):
        print(each)
    short = misses(rows, device)
    if options.enforce and short:
        raise SystemExit("short of the aims:\n" + "\n".join(short))


if __name__ == "__main__":
    main()
