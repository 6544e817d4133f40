"""Counts the bytes of every collective that runs inside a `with Traffic() as traffic:`.

Counted are the whole tensors: what each rank brings to an all-reduce, a reduce-scatter or an exchange of all with all,
and what each rank gets from an all-gather. On a ring of n ranks an all-reduce sends 2 (n-1)/n of that, the others
(n-1)/n each, and an exchange with the next rank alone all of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# operation of torch -> (its name here, which argument to count; -1 is the result)
_OPERATIONS = {
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", -1),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::reduce_": ("reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
}


class Traffic(TorchDispatchMode):
    """bytes: by collective. calls: how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        if name in _OPERATIONS:
            kind, place = _OPERATIONS[name]
            self.bytes[kind] += _size(result if place < 0 else args[place])
            self.calls[kind] += 1
        else:
            assert not name.startswith(("c10d", "_c10d")) or "wait" in name or "barrier" in name, name
        return result


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    assert isinstance(tensors, (list, tuple)), type(tensors)
    return sum(_size(tensor) for tensor in tensors)


def summed(traffic: Traffic) -> dict[str, int]:
    """Return the bytes as plain values that can be sent to the parent."""
    return {kind: int(torch.tensor(size)) for kind, size in traffic.bytes.items()}
