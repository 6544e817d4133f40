"""Kernels compiled ahead of time, without a GPU: registers, spills and shared memory of each.

    python -m megatron.ops.triton.compile [--arch 80 90] [--only NAME] [--json FILE] [--page docs/kernels.md]

The samples of `samples.py` run on meta tensors, which tells with what each operator starts its kernels; exactly those
specialisations are compiled by Triton's own ptxas for each architecture. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from megatron.ops.triton.launch import Launch, recording
from megatron.ops.triton.samples import SAMPLES, Sample

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. registers: of a thread; spilled, shared: bytes of a thread and of a program.

    narrow: instructions that read or write less than 32 bits of global memory, where 128 are possible.
    """

    kernel: str
    sample: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int
    narrow: int


def resources(sample: Sample, arch: int) -> list[Resources]:
    """Return the resources of each kernel that the sample starts, compiled for sm_<arch>; none where it cannot run."""
    found = {}
    for launch in record(sample, arch) if arch >= sample.least else ():
        kernel = compiled(launch, arch)
        found[kernel.hash] = _measured(kernel, launch, sample.name, arch)
    return list(found.values())


def record(sample: Sample, arch: int) -> list[Launch]:
    """Return what the sample would start on sm_<arch>, forward and backward."""
    with recording(arch) as launches:
        sample.run(torch.device("meta"))
    if not launches:
        raise AssertionError(f"{sample.name} started no kernel")
    return launches


def compiled(launch: Launch, arch: int) -> Any:
    """Return Triton's compiled kernel of a launch, specialised on its arguments as a launch on a GPU would be."""
    target = GPUTarget("cuda", arch, 32)
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants = {"debug": False, **launch.constants}
    bound, specialization, options = bind(*launch.arguments, **constants)
    options, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _measured(kernel: Any, launch: Launch, sample: str, arch: int) -> Resources:
    """Read the resource usage that cuobjdump tells of the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(
        kernel=f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__.lstrip('_')}",
        sample=sample,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        narrow=len(re.findall(r"\b(?:ld|st)\.global[.\w:]*\.[bus](?:8|16)\b", kernel.asm["ptx"])),
    )


def markdown(rows: Iterable[Resources]) -> str:
    """Return the resources as a table."""
    titles = ["kernel", "sample", "sm", "warps", "registers", "spilled bytes", "shared bytes", "narrow"]
    table = [titles, ["---"] * len(titles), *([str(value) for value in asdict(row).values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def page(table: str) -> str:
    """Return the text of docs/kernels.md."""
    return (
        "# Kernels, compiled ahead of time\n\n"
        f"Made by `python -m megatron.ops.triton.compile --page docs/kernels.md` with Triton {triton.__version__}, "
        "whose ptxas needs no GPU. A test\n"
        "compiles all of them again: nothing may spill, and this page must be current. How fast they are on a GPU is "
        "a\nmatter of `benchmarks/kernels.py`. Those in C++ for the CPU are in [cpu_kernels.md](cpu_kernels.md).\n\n"
        "Registers are those of a thread (255 at most), spilled bytes of a thread, shared bytes of a program; narrow "
        "are the\ninstructions that read or write less than 32 bits of global memory. A sample is an operation at a "
        "size of\ntraining, forward and backward (`megatron/ops/triton/samples.py`).\n\n"
        f"{table}"
    )


def main() -> None:
    """Compile every sample and print what it needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="samples whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="write the recorded page, of all samples")
    options = parser.parse_args()
    chosen = [sample for sample in SAMPLES if options.only in sample.name]
    rows = [row for sample in chosen for arch in options.arch for row in resources(sample, arch)]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.page:
        options.page.write_text(page(markdown(rows)))
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
