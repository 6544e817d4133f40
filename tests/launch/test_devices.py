from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from megatron.launch import devices
from megatron.launch.devices import torch_has_cuda, usable_cores, visible_gpus


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(devices, "_count_by_nvidia_smi", lambda: 0)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ["2", "0"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-abc, GPU-def"}, ["GPU-abc", "GPU-def"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({"DS_ACCELERATOR": "cpu"}, []),
    ],
)
def test_visible_gpus(tmp_path: Path, environ: dict[str, str], expected: list[str]) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(environ, tmp_path) == expected


def test_a_torch_without_cuda_can_use_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_has_cuda", lambda: False)
    (tmp_path / "nvidia0").touch()
    assert visible_gpus({}, tmp_path) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("__version__ = '2.13.0'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", True),
        ("cuda = None\nhip = '6.2'\n", True),
    ],
)
def test_torchs_build_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert torch_has_cuda() is expected


def test_torchs_build_agrees_with_torch() -> None:
    import torch

    assert torch_has_cuda() is (torch.version.cuda is not None or torch.version.hip is not None)


def test_there_is_a_core() -> None:
    assert usable_cores() >= 1
