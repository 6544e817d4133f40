"""Two checkpoints, compared: their tensors bit by bit, and the config and progress that they record.

Topology and versions say how a checkpoint was made, not what it is: they are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.load import CheckpointReader
from megatron.checkpoint.tensor_file import DTYPES


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two checkpoints differs.

    kind, name: of the tensor. what: in words. largest: of |first - second|. relative: `largest` divided by the largest
    magnitude in the first. Both are None where values cannot be compared, and nan where some are not finite.
    """

    kind: str
    name: str
    what: str
    largest: float | None = None
    relative: float | None = None


def compare_tensors(
    first: CheckpointReader, second: CheckpointReader, on_progress: Callable[[int], None] = lambda size: None
) -> Iterator[TensorDifference]:
    """Yield every tensor that is in one only, or differs in shape, dtype or any bit; two are in memory at a time.

    on_progress: called with the bytes of each tensor of the first that is done.
    Raises CheckpointError where one of the checkpoints is damaged.
    """
    for kind in sorted({*first.kinds, *second.kinds}):
        for name in sorted({*first.names(kind), *second.names(kind)}):
            difference = _compare(kind, name, first, second)
            if difference is not None:
                yield difference
            shape = first.shape(name, kind)
            on_progress(0 if shape is None else math.prod(shape) * first.dtype(name, kind).itemsize)


def total_bytes(reader: CheckpointReader) -> int:
    """Return the bytes of all tensors' values."""
    entries = (entry for table in reader.manifest.tensors.values() for entry in table.values())
    return sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in entries)


def compare_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return "section.key" -> (value in the first, value in the second) of what differs in two nested mappings."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*first, *second}):
        left, right = first.get(key), second.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found.update({f"{key}.{inner}": pair for inner, pair in compare_settings(left, right).items()})
        elif left != right:
            found[key] = (left, right)
    return found


def _compare(kind: str, name: str, first: CheckpointReader, second: CheckpointReader) -> TensorDifference | None:
    shapes = first.shape(name, kind), second.shape(name, kind)
    if shapes[0] is None or shapes[1] is None:
        return TensorDifference(kind, name, f"only in the {'second' if shapes[0] is None else 'first'}")
    if shapes[0] != shapes[1]:
        return TensorDifference(kind, name, f"shape {list(shapes[0])} and {list(shapes[1])}")
    left, right = first.read(name, kind), second.read(name, kind)
    assert left is not None
    assert right is not None
    if left.dtype != right.dtype:
        what = f"dtype {_short(left.dtype)} and {_short(right.dtype)}"
        return TensorDifference(kind, name, what, *_distance(left, right))
    if torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)):
        return None
    return TensorDifference(kind, name, "values", *_distance(left, right))


def _distance(left: Tensor, right: Tensor) -> tuple[float, float]:
    if not left.numel():
        return 0.0, 0.0
    largest = (left.double() - right.double()).abs().max().item()
    magnitude = left.double().abs().max().item()
    return largest, largest / magnitude if magnitude else math.inf if largest else 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
