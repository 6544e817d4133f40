"""What the CUDA kernels need of a GPU, compiled without one: registers, spills and barriers of each.

    python -m megatron.ops.cuda.compile [--arch 80 90 100] [--page docs/cuda_kernels.md]

Builds the library for the architectures, or takes it as it was built before, and reads what nvcc's ptxas said of it.
A library that is compiled here for the architecture of a GPU elsewhere can be copied into the cache there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.ops.building import LOG
from megatron.ops.cuda.build import library

ARCHITECTURES = ("80", "90", "100")

_KINDS = ("losses", "statistics", "gradient")
_TYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
_KERNEL = re.compile(
    r"Compiling entry function '_ZN5deepy9walk_rowsI(?P<type>f|13__nv_bfloat16|6__half)LNS_4KindE(?P<kind>\d)E\w*'"
    r" for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What a kernel needs. registers: of a thread; spilled: bytes of a thread, in its stack or of registers."""

    kernel: str
    logits: str
    arch: int
    registers: int
    spilled: int


def resources(log: str) -> list[Resources]:
    """Return what ptxas said of each kernel, by kernel, type and architecture."""
    found = [
        Resources(
            kernel=_KINDS[int(match["kind"])],
            logits=_TYPES[match["type"]],
            arch=int(match["arch"]),
            registers=int(match["registers"]),
            spilled=int(match["stack"]) + int(match["stores"]) + int(match["loads"]),
        )
        for match in _KERNEL.finditer(log)
    ]
    return sorted(found, key=lambda each: (_KINDS.index(each.kernel), each.logits, each.arch))


def markdown(rows: Iterable[Resources]) -> str:
    """Return the resources as a table."""
    titles = ["kernel", "logits", "sm", "registers", "spilled bytes"]
    table = [titles, ["---"] * len(titles), *([str(value) for value in asdict(row).values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def release(log: str) -> str:
    """Return the version of nvcc that wrote a log."""
    match = re.search(r"^nvcc (\S+)$", log, re.MULTILINE)
    return match[1] if match else "unknown"


def page(log: str) -> str:
    """Return the text of docs/cuda_kernels.md."""
    return (
        "# CUDA C++ kernels, compiled ahead of time\n\n"
        "Made by `python -m megatron.ops.cuda.compile --page docs/cuda_kernels.md` with nvcc "
        f"{release(log)}. A test compiles them again: nothing\n"
        "may spill. Cross entropy is the one operation that has such kernels (`megatron/ops/cuda/`); none of them has "
        "run on a GPU yet.\n\n"
        "`cross_entropy_fusion: cuda` builds them for the GPU at hand when they are first needed, in some seconds, "
        "with the nvcc of CUDA_HOME,\nPATH or NVIDIA's wheels, and keeps them in `~/.cache/deepy/cuda`. Without nvcc "
        "the table of kernels says so, and PyTorch's own are used.\n\n"
        f"Registers are those of a thread: with 64, two blocks of 512 threads fill a multiprocessor.\n\n"
        f"{markdown(resources(log))}\n"
        f"{_PLANS}"
    )


_PLANS = """## Where a row is kept

Shared memory holds a row between the pass that finds its maximum and sum and the pass that writes its gradient; blocks
are those that share a row, which form a cluster and add up their sums through each other's shared memory.

| vocabulary | logits | GPU | blocks | threads | bytes of shared memory | kept of the row |
| --- | --- | --- | --- | --- | --- | --- |
| 50304 | bf16 | H100, H200, B200 | 1 | 512 | 101136 | all |
| 50304 | fp32 | H100, H200, B200 | 2 | 512 | 101136 | all |
| 128256 | bf16 | H100, H200, B200 | 4 | 512 | 64656 | all |
| 256000 | bf16 | H100, H200, B200 | 8 | 512 | 64528 | all |
| 50304 | bf16 | A100 | 1 | 1024 | 101136 | all |
| 128256 | bf16 | A100 | 1 | 1024 | 166912 | 65 %, the rest is read twice |
"""


def main() -> None:
    """Compile for all architectures, and print what the kernels need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="such as 80 90 100")
    parser.add_argument("--page", type=Path, help="write the page to this file")
    options = parser.parse_args()
    log = library(tuple(options.arch)).with_name(LOG).read_text()
    if options.page:
        options.page.write_text(page(log))
    print(markdown(resources(log)), end="")


if __name__ == "__main__":
    main()
