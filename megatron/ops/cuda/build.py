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

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from megatron.errors import KernelError, Problem

SOURCES = Path(__file__).parent
UNITS = ("cross_entropy.cu", "operators.cpp")
LIBRARY = "deepy_cuda.so"
LOG = "build.log"

_STABLE_ABI = "0x020b000000000000"
"""PyTorch 2.11: its functions and no newer ones, whichever version compiles."""

_FLAGS = ("-shared", "-O3", "-std=c++20", "--threads=1", "-Xptxas=-v", "-Xcompiler=-fPIC")
_SECONDS = 600


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
    folder = folder or _cache_folder()
    place = folder / key(architectures)
    if not (place / LIBRARY).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{place.name}.lock"):
            if not (place / LIBRARY).is_file():
                _build(architectures, place)
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


def _build(architectures: tuple[str, ...], place: Path) -> None:
    """Build the library into the folder `place`, which is there whole or not at all."""
    nvcc = compiler()
    if nvcc is None:
        raise _no_compiler()
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", dir=place.parent) as name:
        finished = Path(name) / "finished"
        finished.mkdir()
        words = _run(command(nvcc, architectures, finished / LIBRARY, Path(torch.__file__).parent), Path(name))
        (finished / LOG).write_text(f"nvcc {_release(nvcc)}\n{words}")
        shutil.rmtree(place, ignore_errors=True)  # a folder without its library
        finished.rename(place)


def _release(nvcc: Path) -> str:
    result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\bV(\d[\d.]*)", result.stdout)
    return match[1] if match else "unknown"


def _run(words: list[str], folder: Path) -> str:
    """Return what nvcc says; raise KernelError with it where it fails. folder: for its temporary files."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    try:
        result = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=_SECONDS, env=environment, cwd=folder
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(words, f"{type(error).__name__}: {error}.") from error
    said = result.stdout + result.stderr
    if result.returncode:
        told = [line for line in said.splitlines() if line.strip() and not line.startswith("ptxas info")]
        raise _failed(words, f"nvcc ended with {result.returncode} and said: {' '.join(told[:12])}")
    return said


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


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deepy" / "cuda"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within the block no other process, of any rank on this machine, holds the lock of this path."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
