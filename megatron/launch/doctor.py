"""`./deepy.py doctor`: what this machine has, and the verbatim reason where something cannot be used.

Each package is imported in a process of its own, forked after torch is loaded: an import that crashes, or that
starts CUDA, harms nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.launch.around import other_hosts
from megatron.launch.devices import torch_has_cuda, usable_cores, visible_gpus
from megatron.launch.finding import Finding
from megatron.planning.machine import total_memory

REQUIRED = ("deepspeed", "numpy", "pydantic", "yaml", "safetensors", "tokenizers", "transformers", "rich")
# (module, what it is for, how to get it, whether anything in this version uses it)
OPTIONAL = (
    ("gigatoken", "fast tokenization of data", "pip install gigatoken", True),
    ("sentencepiece", "SPMTokenizer", "pip install sentencepiece", True),
    ("tiktoken", "TiktokenTokenizer", "pip install tiktoken", True),
    ("matplotlib", "the loss plot", "pip install matplotlib", True),
    ("triton", "fused kernels", "comes with torch for CUDA", True),
    ("flash_attn", "FlashAttention", "pip install -r requirements/flash-attn.txt", True),
    ("transformer_engine.pytorch", "precision: fp8", "pip install -r requirements/transformer-engine.txt", True),
    ("apex", "fused optimizers", "see requirements/apex.txt", True),
    ("wandb", "Weights & Biases", "pip install -r requirements/wandb.txt", True),
    ("tensorboard", "TensorBoard", "pip install -r requirements/tensorboard.txt", True),
    ("comet_ml", "Comet", "pip install -r requirements/comet.txt", True),
    ("s3fs", "checkpoints on S3", "pip install -r requirements/s3.txt", True),
    ("lm_eval", "evaluation", "pip install -r requirements/eval.txt", False),
)
GIBIBYTE = 2**30


def main(argv: list[str]) -> int:
    """Print the report; return 0 where training can run, else 1."""
    if argv:
        print("./deepy.py doctor takes no arguments.", file=sys.stderr)
        return 2
    torch = _probe("torch")
    if not torch.problem:
        importlib.import_module("torch")  # once here, so that the forked imports below need not do it again
    required = [torch, *(_probe(name) for name in REQUIRED)]
    _print("Machine", [*machine(), *_devices(required)])
    _print("Required packages", required)
    _print("Optional packages", [_optional(*row) for row in OPTIONAL])
    _print("Compilers", compilers())
    _print("Other hosts", other_hosts(os.environ))
    broken = [finding for finding in required if finding.problem]
    print(verdict(broken))
    return 1 if broken else 0


def verdict(broken: list[Finding]) -> str:
    """Return the last line: whether training can run here, and on what."""
    if broken:
        names = ", ".join(finding.name for finding in broken)
        return f"Training cannot run here: {names} cannot be used. Run `make install`."
    gpus = visible_gpus(os.environ)
    if gpus:
        return f"Training can run here, on {len(gpus)} GPU{'s'[: len(gpus) > 1]}."
    return f"Training can run here, on the CPU ({usable_cores()} cores)."


def _print(title: str, findings: Iterable[Finding]) -> None:
    print(title)
    for finding in findings:
        print(finding, flush=True)
    print()


def machine() -> Iterator[Finding]:
    """Yield what the operating system says."""
    yield Finding("host", f"{platform.node()}, {platform.platform()}")
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("cores", f"{usable_cores()} of {os.cpu_count()} usable ({_processor()})")
    yield Finding("memory", f"{total_memory() / GIBIBYTE:.1f} GiB")
    yield _space("shared memory", "/dev/shm", 1, "data workers may end with SIGBUS; run a container with --shm-size=8g")
    yield _space("disk here", ".", 5, "checkpoints may not fit")


def _space(name: str, path: str, least: float, problem: str) -> Finding:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Finding(name, "none", str(error))
    value = f"{usage.free / GIBIBYTE:.1f} of {usage.total / GIBIBYTE:.1f} GiB free"
    return Finding(name, value, problem if usage.free < least * GIBIBYTE else "")


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo"))
    return match[1] if match else platform.machine()


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _devices(required: list[Finding]) -> Iterator[Finding]:
    """Yield the GPUs as the driver and torch see them."""
    listing = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    for line in listing.splitlines():
        yield Finding("GPU", line)
    if not torch_has_cuda():
        problem = "torch was built without CUDA; the GPU above is not used" if listing else ""
        yield Finding("CUDA in torch", "no (CPU build)", problem)
        return
    result = _in_child(_ask_cuda)
    yield Finding("CUDA in torch", result.get("value", "not usable"), result.get("problem", ""))


def _ask_cuda() -> dict[str, str]:
    torch = importlib.import_module("torch")
    torch.cuda.init()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"value": f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}: {names}"}


def _probe(module: str) -> Finding:
    result = _in_child(lambda: _import(module))
    return Finding(module, result.get("value", "not usable"), result.get("problem", ""))


def _optional(module: str, purpose: str, install: str, is_used: bool) -> Finding:
    """Return what is here of a package; nobody is told to install, or to mend, what this version does not use."""
    finding = _probe(module)
    if not is_used:
        return Finding(module, f"{'not here' if finding.problem else finding.value} (not used by this version)")
    note = f"({purpose})" if not finding.problem else f"({purpose}: {install})"
    return Finding(module, f"{finding.value} {note}", finding.problem)


def _import(module: str) -> dict[str, str]:
    importlib.import_module(module)
    root = module.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(root, [root])
    return {"value": importlib.metadata.version(names[0])}


def _in_child(ask: object) -> dict[str, str]:
    """Return what `ask()` returns in a forked process, or {"problem": the exception's own words or the signal}."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if visible_gpus(os.environ) else "cpu")
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            answer = ask()  # type: ignore[operator]
        except BaseException as error:
            answer = {"problem": traceback.format_exception_only(error)[-1].strip()}
        os.write(writing, json.dumps(answer).encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return {"problem": f"the import ended the process with {signal.Signals(-code).name}"}
    return dict(json.loads(text))


def compilers() -> Iterator[Finding]:
    """Yield what could build kernels; none of it is needed."""
    nvcc = _output("nvcc", "--version") or _output("/usr/local/cuda/bin/nvcc", "--version")
    match = re.search(r"release ([\d.]+)", nvcc)
    yield Finding("nvcc", f"{match[1]}" if match else "none (not needed: nothing is compiled at installation)")
    gcc = _output("gcc", "-dumpfullversion").strip()
    yield Finding("gcc", gcc or "none (needed by torch.compile, Triton and kernels for the CPU)")
    result = _in_child(_cpu_kernels)
    yield Finding("kernels for the CPU", result.get("value", "PyTorch's own"), result.get("problem", ""))
    yield Finding("C library", " ".join(platform.libc_ver()) or "unknown")


def _cpu_kernels() -> dict[str, str]:
    """Build the C++ kernels for this processor, as the first run would."""
    torch, library = (importlib.import_module(name) for name in ("torch", "megatron.ops.cpu.library"))
    reason = library.make_ready(torch.device("cpu"))
    return {"problem": reason} if reason else {"value": f"C++, built by {' '.join(library.compiler())}"}


def _output(*command: str) -> str:
    """Return what a program prints, or "" where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
