"""Kernels are tested on the GPU where there is one, and else in Triton's interpreter on CPU tensors.

TRITON_INTERPRET counts while triton and the kernels are imported, and is gone afterwards: no other test of this
process, and no process that it starts, sees it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
FOLDER = Path(__file__).parent

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton.experimental.gluon  # which triton itself imports late, and which asks for TRITON_INTERPRET too

    import megatron.ops.triton.launch
    import megatron.ops.triton.samples  # noqa: F401  (imports every kernel)
finally:
    os.environ.pop("TRITON_INTERPRET", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_GPU and FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if HAS_GPU else "cpu")
