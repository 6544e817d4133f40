"""A linear layer in float8 beside the same in bf16: TFLOP/s forward and backward, in one run.

    python benchmarks/fp8.py [--quick] [--json FILE] [--enforce]

Beside what the catalogue offers for `float8_linear` and this device can run (PyTorch's eager, our Triton kernels,
Transformer Engine), eager under torch.compile, all with the conversions of both factors counted as part of the layer.
Shapes are the two matrices of an MLP, h to 4h and back, and 16384 tokens. Before a candidate is timed, it must agree
with the formula.

--enforce fails where, at 4096 features, what `auto` takes is not 1.3 times as fast as bf16, forward and backward
together. It has no aim on a CPU, which has no float8 products and computes their numbers in a longer way.
--quick: one width.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Clock, candidates
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Function, Situation, choose
from megatron.ops.fp8 import obstacle
from megatron.ops.linear import linear
from megatron.ops.measured import fastest

GPU_WIDTHS, CPU_WIDTHS = (4096, 1024, 2048, 8192), (512,)
AIM = 1.3
LARGEST_ERROR = 0.06
"""Of y, relative: roundings to 4 significant bits make 0.037."""


@dataclass(frozen=True)
class Row:
    """One measurement. forward, backward: TFLOP/s; ratio: the time of bf16 by this one's, both passes."""

    candidate: str
    tokens: int
    inputs: int
    outputs: int
    forward: float
    backward: float
    milliseconds: float
    ratio: float


def passes(function: Function, tokens: int, inputs: int, outputs: int, clock: Clock) -> tuple[float, float]:
    """Return the median seconds of the forward and of the backward pass."""
    shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    x, weight, upstream = (torch.randn(shape, dtype=torch.bfloat16, device=clock.device) for shape in shapes)
    leaves = [x.requires_grad_(), weight.div_(inputs**0.5).requires_grad_()]
    require_agreement(function, x[:64].detach(), weight.detach())
    forward = clock.median(lambda: function(*leaves))
    output: Tensor = function(*leaves)
    return forward, clock.median(lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True))


def require_agreement(function: Function, x: Tensor, weight: Tensor) -> None:
    """End the benchmark where a function is neither the plain product nor that of float8."""
    exact, found = F.linear(x.float(), weight.float()), function(x, weight).float()
    error = float((found - exact).norm() / exact.norm())
    if not error < LARGEST_ERROR:
        raise SystemExit(f"{function}: y is off by {error:.2g} of itself")


def functions(situation: Situation) -> Iterator[tuple[str, Function]]:
    """Yield bf16 and everything that computes it in float8 here."""
    yield "bf16", linear
    yield from candidates("float8_linear", situation, compiled=False)
    if situation.device.type == "cuda":
        torch.compiler.reset()
        compiled: Callable[..., Any] = torch.compile(CATALOGUE["float8_linear"].candidates[0].load(), dynamic=False)
        yield "compile", compiled


def measure(width: int, tokens: int, clock: Clock) -> Iterator[Row]:
    """Yield the rows of both matrices of an MLP; say why something does not run."""
    for inputs, outputs in ((width, 4 * width), (4 * width, width)):
        flops, plain = 2.0 * tokens * inputs * outputs, 0.0
        for name, function in functions(Situation(clock.device, torch.bfloat16, inputs)):
            try:
                forward, backward = passes(function, tokens, inputs, outputs, clock)
            except RuntimeError as error:  # of a library or a compiler that does not work here: the others go on
                print(f"{name}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
                continue
            plain = plain or forward + backward
            rates = flops / forward / 1e12, 2 * flops / backward / 1e12
            both = forward + backward
            yield Row(name, tokens, inputs, outputs, *rates, both * 1e3, plain / both)


def miss(rows: list[Row], chosen: str) -> str:
    """Return what falls short of the aim, or ""."""
    ratios = [row.ratio for row in rows if row.candidate == chosen and GPU_WIDTHS[0] in (row.inputs, row.outputs)]
    least = min(ratios, default=0.0)
    return "" if least >= AIM else f"{chosen}: {least:.2f} times as fast as bf16 (aim {AIM})"


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--enforce", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    reason = obstacle(device)
    if reason:
        raise SystemExit(reason)
    widths, tokens = (GPU_WIDTHS, 16384) if on_gpu else (CPU_WIDTHS, 512)
    clock = Clock(device, seconds=0.1 if on_gpu or options.quick else 0.5)
    situation = Situation(device, torch.bfloat16, widths[0])
    choices = choose({"float8_linear": "auto"}, situation, CATALOGUE, fastest)
    print(choices.table())
    titles = "forward TFLOP/s  backward TFLOP/s   both ms   beside bf16"
    print(f"\n{'candidate':18} {'tokens':>6} {'in':>6} {'out':>6}  {titles}")
    rows: list[Row] = []
    for width in widths[:1] if options.quick else widths:
        for row in measure(width, tokens, clock):  # each as it is measured
            rows.append(row)
            print(f"{row.candidate:18} {row.tokens:6} {row.inputs:6} {row.outputs:6} {row.forward:16.2f} "
                  f"{row.backward:17.2f} {row.milliseconds:9.3f} {row.ratio:13.2f}", flush=True)  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    missed = miss(rows, choices.choices[0].candidate) if on_gpu else ""
    if missed:
        print(f"missed: {missed}")
        sys.exit(1 if options.enforce else 0)


if __name__ == "__main__":
    main()
