"""Which candidate of an operation was the fastest, by device and hidden size: what `auto` follows on a GPU.

Rows are the results of `benchmarks/kernels.py` on that device. None has been measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.ops.choice import Situation


@dataclass(frozen=True)
class Fastest:
    """A measurement. device: start of the GPU's name. hidden_size, length: the smallest for which it holds."""

    device: str
    operation: str
    hidden_size: int
    candidate: str
    length: int = 0


ROWS: tuple[Fastest, ...] = ()


def fastest(operation: str, situation: Situation) -> str | None:
    """Return the candidate that was the fastest at the nearest hidden size not above this one; None: not measured."""
    if situation.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(situation.device)
    return among(ROWS, name, operation, situation.hidden_size, situation.length)


def among(rows: tuple[Fastest, ...], device: str, operation: str, hidden_size: int, length: int = 0) -> str | None:
    """Return the candidate of the fitting row with the largest hidden size, and of these with the largest length."""
    fitting = [row for row in rows if row.operation == operation and device.startswith(row.device)]
    below = [row for row in fitting if row.hidden_size <= hidden_size and row.length <= length]
    return max(below, key=lambda row: (row.hidden_size, row.length)).candidate if below else None
