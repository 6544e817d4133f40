"""On a GPU all tests of this folder run compiled, and are marked `gpu`; else they run in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.triton.interpreted import HAS_GPU

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_GPU and FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if HAS_GPU else "cpu")
