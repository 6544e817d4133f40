"""The library of C++ kernels for the CPU: built by the system's compiler when a run first needs it, and kept.

    reason = make_ready(torch.device("cpu"))        # "" once the kernels can be called, else why they cannot
    kernel("deepy_block_losses", "pippiiiif")(...)  # a function of it, by the letters of its arguments

A library is for the sources, the compiler, its flags and the processor that its folder's name is a hash of (a home
folder may be shared by machines that differ), under $XDG_CACHE_HOME/deepy/cpu, or ~/.cache/deepy/cpu. The compiler is
$CXX, or without one c++, g++ or clang++. Its loops run on PyTorch's threads, by a function that PyTorch has since 2.10.
A file that is not what was built is built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.logs import get_logger
from megatron.ops.building import BuildError, built_once, cache_folder, run_compiler

logger = get_logger(__name__)

SOURCES = Path(__file__).parent
LIBRARY = "deepy_cpu.so"
DIGEST = "sha256"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers that kernels know dtypes by (vectors.h)."""

_FLAGS = ("-shared", "-fPIC", "-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden")
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_ARGUMENTS: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}

_PLAIN = (Tensor, torch.nn.Parameter)

_loaded: list[ctypes.CDLL] = []


@cache
def make_ready(device: torch.device) -> str:
    """Load the library, built if need be; return why it cannot be had here, or ""."""
    try:
        _loaded[:] = [_load(library())]
    except (BuildError, OSError, RuntimeError, ValueError) as error:  # a user without a home, an odd $CXX, among others
        return " ".join(str(error).split())
    return ""


@cache
def kernel(name: str, arguments: str) -> Callable[..., int]:
    """Return a function of the library, which releases the GIL; `make_ready` has loaded it.

    arguments: a letter for each: p pointer, i int64, f float, d double. All return an int64.
    """
    function = _loaded[0][name]
    function.argtypes = [_ARGUMENTS[letter] for letter in arguments]
    function.restype = ctypes.c_int64
    return function


@cache
def has_bf16() -> bool:
    """Return whether this processor multiplies pairs of bf16, and kernels do; `make_ready` has loaded the library."""
    return bool(kernel("deepy_has_bf16_products", "")())


def is_plain(*tensors: Tensor) -> bool:
    """Return whether all are in the CPU's memory, of a dtype that kernels know, and nothing is being traced.

    A view of negated numbers (the imaginary part of a conjugate) is not: its memory holds them with the other sign.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # no generator: kernels of some microseconds ask this at each call
        if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.dtype not in DTYPES or tensor.is_neg():
            return False
    return True


def library(folder: Path | None = None) -> Path:
    """Return the library for this processor. Raises BuildError with the reason, OSError where it cannot be kept.

    folder: of all libraries; None is the one of this module's description.
    """
    words = compiler()
    if not words:
        asked = os.environ.get("CXX")
        tried = f"$CXX is {asked}, which is not there" if asked else "neither c++ nor g++ or clang++ is in PATH"
        raise BuildError(f"no C++ compiler was found: {tried}")
    place = (folder or cache_folder("cpu")) / key(words)
    built_once(place, _is_whole, lambda *folders: _build(words, *folders))
    return place / LIBRARY


def compiler() -> list[str]:
    """Return the command of the C++ compiler, or nothing where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        found = shutil.which(asked[0])
        return [found, *asked[1:]] if found else []
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), [])


def command(words: list[str], target: Path) -> list[str]:
    """Return what builds the library `target`."""
    units = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    return [*words, *_flags(), *units, "-o", str(target)]


def key(words: list[str]) -> str:
    """Return the name of the folder of a library."""
    digest = hashlib.sha256(repr((words[1:], _version(words), _flags(), _processor())).encode())
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return f"{platform.machine()}-{digest.hexdigest()[:16]}"


def _flags() -> tuple[str, ...]:
    native = _NATIVE.get(platform.machine())
    return (*_FLAGS, native) if native else _FLAGS


def _version(words: list[str]) -> str:
    try:
        result = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{words[0]}: {type(error).__name__}: {error}") from error
    return result.stdout


def _processor() -> str:
    """Return what tells this processor from others that need other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in names)


def _build(words: list[str], finished: Path, scratch: Path) -> str:
    """Put the library and its digest into the folder `finished`; return what the compiler says."""
    logger.info("building the C++ kernels for this processor, once, in some seconds")
    words = command(words, finished / LIBRARY)
    said = run_compiler(words, scratch)
    (finished / DIGEST).write_text(_digest(finished / LIBRARY))
    return f"{shlex.join(words)}\n{said}"


def _is_whole(place: Path) -> bool:
    """Return whether the library is there and is what was built: a truncated one would crash the process."""
    try:
        return (place / DIGEST).read_text() == _digest(place / LIBRARY)
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(path: Path) -> ctypes.CDLL:
    """Return the library, which knows PyTorch's parallel loop. Raises BuildError where this PyTorch has none."""
    name = "libtorch_cpu.dylib" if platform.system() == "Darwin" else "libtorch_cpu.so"
    try:
        parallel_for = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError) as error:
        raise BuildError(f"PyTorch {torch.__version__} has no torch_parallel_for, which came with 2.10") from error
    loaded = ctypes.CDLL(str(path))
    set_parallel_for = loaded.deepy_set_parallel_for
    set_parallel_for.argtypes = [ctypes.c_void_p]
    set_parallel_for(ctypes.cast(parallel_for, ctypes.c_void_p))
    return loaded
