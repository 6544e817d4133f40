"""benchmarks/attention.py keeps what it has measured while it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import Row, Shape
from megatron.ops.measured import Fastest

SHAPES = [Shape(1, 32, 2, 8), Shape(1, 64, 2, 8)]


def test_what_is_measured_is_kept_after_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in a GPU's place; the second shape breaks off."""

    def measured(name: str, backend: Any, kind: str, shape: Shape, *_: Any) -> Row:
        if shape is SHAPES[1]:
            raise KeyboardInterrupt
        return Row(shape, kind, name, 1.0, 1.0, 2.0 if name == "dense" else 3.0)

    written: list[list[Fastest]] = []
    monkeypatch.setattr(attention, "measured", measured)
    monkeypatch.setattr(attention, "write", written.append)
    keep = lambda rows: attention.keep_rows(rows, "NVIDIA X", True, tmp_path / "out.json", True)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        attention.on_a_gpu(SHAPES, torch.device("cpu"), keep)
    names = ["attention", "attention window", "attention documents"]
    assert written == [[Fastest("NVIDIA X", name, 8, "dense", 32) for name in names]]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["backend"] for row in found["rows"]} >= {"sdpa", "dense"}
    assert len(found["fastest"]) == 3
