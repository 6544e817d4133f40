"""What the tests of the CUDA kernels share: the device code on a CPU, and the library that nvcc builds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron.ops.cuda import build
from tests.ops.cuda.emulation import H100, OLDEST, Emulation, compiled

ARCHITECTURES = ("80", "90", "100")


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels on an H100 that is not there."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.partition(".")[0]) < OLDEST:
        pytest.skip(f"g++ {version.strip()} has no _Float16; {OLDEST} has")
    return Emulation(compiled(tmp_path_factory.mktemp("emulation")), H100)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for all architectures, built once for all processes of the tests."""
    if build.compiler() is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.getbasetemp()
    return build.library(ARCHITECTURES, (folder.parent if folder.name.startswith("popen") else folder) / "cuda")
