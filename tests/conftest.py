"""What all tests share: a CPU accelerator for DeepSpeed, kernels for Triton's interpreter where they are tested, and
the folder of recorded GPT-NeoX outputs."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from megatron import whereabouts

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "tests" / "ops" / "triton"


def pytest_configure(config: pytest.Config) -> None:
    """Import the kernels before any other test module imports triton, where their tests are among those asked for."""
    paths = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    if any(KERNELS.is_relative_to(path) or path.is_relative_to(KERNELS) for path in paths):
        importlib.import_module("tests.ops.triton.interpreted")


@pytest.fixture(autouse=True)
def nowhere_yet() -> None:
    """Each test stands where a process begins: no step that an earlier one trained in this process is left."""
    whereabouts.reset()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of outputs recorded from GPT-NeoX; it is not part of the project, so its absence skips the test."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the recorded outputs of GPT-NeoX are not beside this checkout")
    return folder
