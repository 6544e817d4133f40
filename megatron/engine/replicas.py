"""Tensors of which several ranks hold a copy are compared between those ranks, bit by bit, by checksum.

    replicas axis (data x context):  every weight, and masters where each rank has all of them
    tensor axis:                     every parameter that is not split over it
    pipeline axis:                   every parameter that more than one stage holds (tied embeddings)

The checksum of a tensor is the sum of its bits, read as integers: exact, in any order, on the device. A check costs one
pass over the weights and three reductions of one integer per tensor; tensors are named only where some differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.fragments import Holdings
from megatron.errors import EngineError, Problem
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.sharding import get_spec

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_MOST_NAMED = 10


@dataclass(frozen=True)
class Copy:
    """A tensor that other ranks hold too.

    name: canonical name of its parameter. kind: "weight" or "master". numel: its elements on this rank.
    over_replicas, over_tensor: whether all ranks of that axis hold the same values.
    """

    name: str
    kind: str
    tensor: Tensor
    over_replicas: bool
    over_tensor: bool


@dataclass(frozen=True)
class _Difference:
    """What one rank has of a tensor that is not alike everywhere. tensor_rank: of a split parameter, else -1."""

    name: str
    kind: str
    tensor_rank: int
    place: str
    rank: int
    checksum: int


def copies(module: nn.Module, holdings: Holdings) -> Iterator[Copy]:
    """Yield this rank's weights and masters, each with the axes over which it must be alike.

    Where weights are sharded over the replicas (ZeRO 3), the rank's shares stand in for those it has not whole.
    """
    whole = {name for name, parameter in module.named_parameters() if _is_whole(parameter)}
    for name, parameter in module.named_parameters():
        if name in whole:
            yield Copy(name, "weight", parameter.detach(), True, get_spec(parameter).dim is None)
    for fragment in holdings.held:
        over_tensor = get_spec(fragment.parameter).dim is None
        if fragment.name not in whole:
            yield Copy(fragment.name, "weight", fragment.weight, False, over_tensor)
        if fragment.master.data_ptr() != fragment.weight.data_ptr():
            has_all = fragment.numel == fragment.parameter.numel() and holdings.is_replicated
            yield Copy(fragment.name, "master", fragment.master, has_all, over_tensor)


def check(held: Iterable[Copy], mesh: Mesh) -> None:
    """Raise EngineError on every rank, naming tensors and ranks, unless all copies are alike; every rank calls it."""
    if mesh.world.group is None or mesh.world.size == 1:
        return
    mine = list(held)
    sums = checksums([copy.tensor for copy in mine], mesh.device)
    wrong = torch.zeros(len(mine), dtype=torch.bool, device=mesh.device)
    wrong |= _differ(sums, [copy.over_replicas for copy in mine], mesh.replicas)
    wrong |= _differ(sums, [copy.over_tensor for copy in mine], mesh.tp)
    wrong |= _differ_between_stages(sums, mine, mesh.pp)
    is_wrong = wrong.any().to(torch.int32)
    dist.all_reduce(is_wrong, op=dist.ReduceOp.MAX, group=mesh.world.group)
    if is_wrong.item():
        _raise(_differences(mine, sums, wrong, mesh))


def checksums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the bits of each tensor, [len(tensors)] int64 on `device`."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([_checksum(tensor).to(device) for tensor in tensors])


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _is_whole(parameter: nn.Parameter) -> bool:
    """Return whether this rank has all of its share on the tensor axis, which under ZeRO 3 only small ones are."""
    return parameter.numel() == getattr(parameter, "ds_numel", parameter.numel())


def _differ(sums: Tensor, compared: Sequence[bool], axis: Axis) -> Tensor:
    """Return which of the sums, where `compared`, are not alike on all ranks of the axis, [len(sums)] bool.

    The ranks of the axis must agree on `compared`."""
    wrong = torch.zeros_like(sums, dtype=torch.bool)
    chosen = torch.tensor(compared, dtype=torch.bool, device=sums.device)
    if axis.size > 1 and any(compared):
        wrong[chosen] = _is_range(sums[chosen], axis)
    return wrong


def _is_range(sums: Tensor, axis: Axis) -> Tensor:
    """Return where the largest and the smallest value over the axis differ; ~x is decreasing and cannot overflow."""
    both = torch.stack((sums, ~sums))
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=axis.group)
    return both[0] != ~both[1]


def _differ_between_stages(sums: Tensor, mine: Sequence[Copy], stages: Axis) -> Tensor:
    """Return which weights that several stages hold are not alike on them."""
    wrong = torch.zeros_like(sums, dtype=torch.bool)
    if stages.size == 1:
        return wrong
    places = {copy.name: index for index, copy in enumerate(mine) if copy.kind == "weight" and copy.over_replicas}
    held: list[list[str]] = [[]] * stages.size
    dist.all_gather_object(held, list(places), group=stages.group)
    shared = [name for name, count in Counter(name for names in held for name in names).items() if count > 1]
    lowest = torch.iinfo(torch.int64).min
    both = torch.full((2, len(shared)), lowest, dtype=torch.int64, device=sums.device)
    for column, name in enumerate(shared):
        if name in places:
            both[0, column], both[1, column] = sums[places[name]], ~sums[places[name]]
    if shared:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=stages.group)
    for column, differs in enumerate((both[0] != ~both[1]).tolist()):
        if differs and shared[column] in places:
            wrong[places[shared[column]]] = True
    return wrong


def _differences(mine: Sequence[Copy], sums: Tensor, wrong: Tensor, mesh: Mesh) -> list[_Difference]:
    """Return what every rank has of the tensors that differ somewhere, in order of rank."""
    values = sums.tolist()
    found = [
        _Difference(
            copy.name, copy.kind, -1 if copy.over_tensor else mesh.tp.rank, mesh.describe(), mesh.world.rank, value
        )
        for copy, value, differs in zip(mine, values, wrong.tolist(), strict=True)
        if differs
    ]
    gathered: list[list[_Difference]] = [[]] * mesh.world.size
    dist.all_gather_object(gathered, found, group=mesh.world.group)
    return [difference for rank in gathered for difference in rank]


def _raise(differences: Sequence[_Difference]) -> None:
    """Raise one EngineError with a problem for each tensor, the first few of them."""
    tensors: dict[tuple[str, str, int], dict[int, list[_Difference]]] = {}
    for found in differences:
        versions = tensors.setdefault((found.name, found.kind, found.tensor_rank), {})
        versions.setdefault(found.checksum, []).append(found)
    problems = []
    for (name, kind, _), versions in list(tensors.items())[:_MOST_NAMED]:
        rarest = sorted(versions.values(), key=len)
        told = "; ".join(" and ".join(found.place for found in version) for version in rarest)
        problems.append(
            Problem(
                what=f"{name} ({kind}) has {len(versions)} versions",
                why=f"its copies must be alike and are not: {told}.",
                fix="Go on from the last checkpoint. If it returns on the same rank, test that machine's memory and "
                "GPU; if not, report it with the configuration.",
            )
        )
    if len(tensors) > _MOST_NAMED:
        problems.append(Problem(f"{len(tensors) - _MOST_NAMED} more tensors", "as above.", ""))
    raise EngineError(*problems)
