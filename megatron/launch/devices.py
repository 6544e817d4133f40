"""Which GPUs and cores this machine offers, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def visible_gpus(environ: Mapping[str, str], device_folder: Path = Path("/dev")) -> list[str]:
    """Return the GPUs a run may use, as CUDA_VISIBLE_DEVICES would name them.

    environ: DS_ACCELERATOR=cpu hides all; CUDA_VISIBLE_DEVICES names a choice ("" and "-1" hide all).
    device_folder: where the driver puts `nvidia0`, `nvidia1` ...; `nvidia-smi -L` is asked where there are none.
    A torch built without CUDA can use no GPU, so the list is empty then too.
    """
    if environ.get("DS_ACCELERATOR", "").lower() == "cpu" or not torch_has_cuda():
        return []
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else [n for n in names if n != "NoDevFiles"]
    count = sum(1 for node in device_folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name))
    return [str(index) for index in range(count or _count_by_nvidia_smi())]


def _count_by_nvidia_smi() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in listing.stdout.splitlines() if re.match(r"GPU \d+:", line))


def torch_has_cuda() -> bool:
    """Return whether the installed torch was built with CUDA (or ROCm), read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).parent / "version.py"
    if not version_file.exists():
        return True
    return re.search(r"^(cuda|hip)[^=\n]*=\s*['\"]", version_file.read_text(), re.MULTILINE) is not None


def usable_cores() -> int:
    """Return how many CPU cores this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, max(1, round(int(allowed) / int(period))))
    return cores
