"""Which candidate of an operation was the fastest, by device and hidden size: what `auto` follows on a GPU.

The rows are in `measured.json` beside this file, where `python benchmarks/kernels.py --write` puts what it measured on
the GPU that it ran on. On a CPU nothing but eager is chosen by measurement: kernels cannot run, and what torch.compile
wins there it loses to its C++ compiler at every start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from megatron.ops.choice import Situation

PATH = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Fastest:
    """A measurement. device: start of the GPU's name. hidden_size, length: the smallest for which it holds."""

    device: str
    operation: str
    hidden_size: int
    candidate: str
    length: int = 0


@cache
def read_rows(path: Path = PATH) -> tuple[Fastest, ...]:
    """Return everything that was measured."""
    return tuple(Fastest(**row) for row in json.loads(path.read_text()))


def write(found: Sequence[Fastest], path: Path = PATH) -> Path:
    """Put rows into the file, where those of the same device and operation were; return its path."""
    replaced = {(row.device, row.operation) for row in found}
    kept = [row for row in read_rows(path) if (row.device, row.operation) not in replaced]
    ordered = sorted([*kept, *found], key=lambda row: (row.device, row.operation, row.hidden_size))
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in ordered)
    path.write_text(f"[\n{lines}\n]\n" if ordered else "[]\n")
    read_rows.cache_clear()
    return path


def fastest(operation: str, situation: Situation) -> str | None:
    """Return the candidate that was the fastest at the nearest hidden size not above this one; None: not measured."""
    if situation.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(situation.device)
    return among(read_rows(), name, operation, situation.hidden_size, situation.length)


def among(rows: tuple[Fastest, ...], device: str, operation: str, hidden_size: int, length: int = 0) -> str | None:
    """Return the candidate of the fitting row with the largest hidden size, and of these with the largest length."""
    fitting = [row for row in rows if row.operation == operation and device.startswith(row.device)]
    below = [row for row in fitting if row.hidden_size <= hidden_size and row.length <= length]
    return max(below, key=lambda row: (row.hidden_size, row.length)).candidate if below else None
