"""Counts the bytes of every collective that runs inside a `with Traffic() as traffic:`, groups of one rank apart.

Counted are the whole tensors: what each rank brings to an all-reduce, a reduce-scatter or an exchange of all with all,
what each rank gets from an all-gather, and each message to another rank. On a ring of n ranks an all-reduce sends
2 (n-1)/n of that, the others (n-1)/n each, and an exchange with the next rank alone all of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel.mesh import Mesh

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
    "c10d::send": ("send", 0),
}
_SILENT = ("wait", "barrier", "recv", "monitored")


class Traffic(TorchDispatchMode):
    """bytes: by collective. calls: how many there were.

    by_axis: bytes by (axis of the mesh, collective). Messages are the pipeline's and exchanges of all with all the
    context's; of axes with the same ranks the replicas' counts; "other" are ranks that are no axis.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.by_axis: Counter[tuple[str, str]] = Counter()
        axes = (
            {} if mesh is None else {"data": mesh.replicas, "tensor": mesh.tp, "pipeline": mesh.pp, "context": mesh.cp}
        )
        self._axes = {tuple(_ranks(axis.group)): name for name, axis in reversed(axes.items()) if axis.size > 1}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        if name in _OPERATIONS:
            kind, place = _OPERATIONS[name]
            ranks = _ranks(_group(args))
            if len(ranks) > 1:
                size = _size(result if place < 0 else args[place])
                self.bytes[kind] += size
                self.calls[kind] += 1
                axis = {"send": "pipeline", "all_to_all": "context"}.get(kind, self._axes.get(tuple(ranks), "other"))
                self.by_axis[axis, kind] += size
        else:
            assert not name.startswith(("c10d", "_c10d")) or any(word in name for word in _SILENT), name
        return result


def _group(args: Any) -> dist.ProcessGroup:
    """Return the group of a collective, from its arguments: an object, or the last of its words."""
    for argument in reversed(args):
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
        if isinstance(argument, str):
            return dist.distributed_c10d._resolve_process_group(argument)
    raise AssertionError(args)


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    assert isinstance(tensors, (list, tuple)), type(tensors)
    return sum(_size(tensor) for tensor in tensors)


def summed(traffic: Traffic) -> dict[str, int]:
    """Return the bytes as plain values that can be sent to the parent."""
    return {kind: int(torch.tensor(size)) for kind, size in traffic.bytes.items()}
