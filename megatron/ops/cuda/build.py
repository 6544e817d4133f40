"""The library of CUDA kernels: built by nvcc when a GPU first needs it, and kept for all later runs.

    reason = make_ready(torch.device("cuda"))   # "" once torch.ops.deepy_cuda has its kernels, else why it has not

A library is for the sources, the flags, the version of PyTorch and the architectures of GPU and processor that its
folder's name is a hash of, under $XDG_CACHE_HOME/deepy/cuda, or ~/.cache/deepy/cuda. It is built in a folder of its
own, which a rename puts in place; of many ranks one builds, and the others wait for it. Nothing is downloaded, and
where the library is there already, no compiler is needed. What nvcc says stays beside it, in build.log.

nvcc is taken from $CUDA_HOME or $CUDA_PATH, else from PATH, else from the wheels nvidia-cuda-nvcc and its like, else
from /usr/local/cuda. Only `operators.cpp` knows PyTorch, by LibTorch's stable ABI as of 2.11.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from megatron.errors import KernelError, Problem
from megatron.ops.building import BuildError, built_once, cache_folder, run_compiler

SOURCES = Path(__file__).parent
UNITS = ("cross_entropy.cu", "operators.cpp")
LIBRARY = "deepy_cuda.so"

_STABLE_ABI = "0x020b000000000000"
"""PyTorch 2.11: its functions and no newer ones, whichever version compiles."""

_FLAGS = ("-shared", "-O3", "-std=c++20", "--threads=1", "-Xptxas=-v", "-Xcompiler=-fPIC")


@cache
def make_ready(device: torch.device) -> str:
    """Load the library for a CUDA device, built if need be; return why it cannot be had here, or ""."""
    major, minor = torch.cuda.get_device_capability(device)
    try:
        torch.ops.load_library(str(library((f"{major}{minor}",))))
    except (KernelError, OSError) as error:  # PyTorch hides what the loader said behind a sentence of its own
        return " ".join(f"{error} {error.__cause__ or ''}".split())
    return ""


def library(architectures: tuple[str, ...], folder: Path | None = None) -> Path:
    """Return the library for architectures such as "90", the last of them as PTX for newer ones too.

    folder: of all libraries; None is the one of this module's description. Raises KernelError in nvcc's words.
    """
    place = (folder or cache_folder("cuda")) / key(architectures)
    built_once(place, lambda place: (place / LIBRARY).is_file(), lambda *folders: _build(architectures, *folders))
    return place / LIBRARY


def key(architectures: tuple[str, ...]) -> str:
    """Return the name of the folder of a library."""
    digest = hashlib.sha256(repr((architectures, platform.machine(), torch.__version__, _FLAGS, _STABLE_ABI)).encode())
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return f"sm_{'_'.join(architectures)}-{digest.hexdigest()[:16]}"


def compiler() -> Path | None:
    """Return nvcc, or None where there is none."""
    homes = (Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    found = [home / "bin" / "nvcc" for home in homes]
    on_path = shutil.which("nvcc")
    found += [Path(on_path)] if on_path else []
    found += [tree / "bin" / "nvcc" for tree in _wheels()]
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in found if path.is_file() and os.access(path, os.X_OK)), None)


def command(nvcc: Path, architectures: tuple[str, ...], target: Path, torch_folder: Path) -> list[str]:
    """Return what builds the library `target`. torch_folder: where PyTorch's include/ and lib/ are."""
    codes = {
        each: f"[sm_{each},compute_{each}]" if each == architectures[-1] else f"sm_{each}" for each in architectures
    }
    tree = nvcc.parent.parent
    folders = [torch_folder / "lib", *([tree / "lib"] if (tree / "nvvm").is_dir() else [])]  # wheels have no lib64
    names = [name for name in ("torch_cpu", "torch_cuda") if (torch_folder / "lib" / f"lib{name}.so").exists()]
    return [
        str(nvcc),
        *_FLAGS,
        *(f"-gencode=arch=compute_{each},code={code}" for each, code in codes.items()),
        f"-DTORCH_TARGET_VERSION={_STABLE_ABI}",
        f"-I{torch_folder / 'include'}",
        *(str(SOURCES / unit) for unit in UNITS),
        *(f"-L{folder}" for folder in folders),
        "-Xlinker=--no-as-needed",  # the stream's symbol is weak, which alone would not keep libtorch_cuda
        *(f"-l{name}" for name in names),
        "-o",
        str(target),
    ]


def _build(architectures: tuple[str, ...], finished: Path, scratch: Path) -> str:
    """Put the library into the folder `finished`; return what nvcc says."""
    nvcc = compiler()
    if nvcc is None:
        raise _no_compiler()
    words = command(nvcc, architectures, finished / LIBRARY, Path(torch.__file__).parent)
    try:
        return f"nvcc {_release(nvcc)}\n{run_compiler(words, scratch)}"
    except BuildError as error:
        raise _failed(words, str(error)) from error


def _release(nvcc: Path) -> str:
    result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\bV(\d[\d.]*)", result.stdout)
    return match[1] if match else "unknown"


def _failed(words: list[str], why: str) -> KernelError:
    return KernelError(
        Problem(
            what="CUDA kernels of megatron/ops/cuda",
            where=words[0],
            why=why,
            fix="Set CUDA_HOME to a toolkit that knows this GPU, or leave cuda out of the fusion keys.",
        )
    )


def _no_compiler() -> KernelError:
    return KernelError(
        Problem(
            what="CUDA kernels of megatron/ops/cuda",
            why="no nvcc was found in CUDA_HOME, in PATH, among the installed wheels or in /usr/local/cuda.",
            fix="Set CUDA_HOME, or pip install nvidia-cuda-nvcc of the version that torch was built with.",
        )
    )


def _wheels() -> list[Path]:
    """Return the folders under nvidia/ that NVIDIA's wheels have filled."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    return sorted(tree for root in roots for tree in Path(root).iterdir() if tree.is_dir())
