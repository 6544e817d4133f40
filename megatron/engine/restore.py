"""The engine's state out of a checkpoint: masters and optimizer state, from which weights are made afterwards.

Each rank asks for the ranges that it holds. What all replicas hold alike (ZeRO 0) one of them reads, in turn, and
the others have it from that one, so that all ranks together read a checkpoint about once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.base import StateSource
from megatron.engine.fragments import Fragment, Holdings, is_elementwise
from megatron.engine.state import SCALER, SCALER_FIELDS, make_states
from megatron.errors import CheckpointError, DamagedCheckpointError, Problem
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.sharding import StateRequest, full_shape, get_spec

_MOST_NAMED = 20


@torch.no_grad()
def load(holdings: Holdings, mesh: Mesh, source: StateSource, with_optimizer: bool) -> None:
    """Fill this rank's masters, and its optimizer state where `with_optimizer`, else made afresh; not the weights.

    Every rank must call it. Raises CheckpointError on all of them where a tensor is missing or of another shape, or
    cannot be read, on any.
    """
    if with_optimizer:
        make_states(holdings, afresh=True)
    plan = _Plan(source, mesh)
    for fragment in holdings.held:
        plan.add_master(fragment, with_optimizer)
        if with_optimizer:
            plan.add_state(fragment, holdings.state(fragment.buffer))
    if with_optimizer and holdings.scaler is not None:
        plan.add_scaler(holdings.scaler)
    plan.carry_out(mesh.replicas if holdings.is_replicated else Axis("alone"))
    if not with_optimizer:
        make_states(holdings, afresh=True)


@dataclass
class _Plan:
    """What to read, what to do with it once all ranks have theirs, and what is known not to fit."""

    source: StateSource
    mesh: Mesh
    requests: list[StateRequest] = field(default_factory=list)
    after: list[Callable[[], None]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add_master(self, fragment: Fragment, with_optimizer: bool) -> None:
        """Ask for the fp32 values, where the checkpoint has them and they are wanted, else for the weights."""
        has_master = with_optimizer and self.source.shape(fragment.name, "master") is not None
        self._add(fragment, "master" if has_master else "weight", fragment.master)

    def add_state(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """Ask for all entries of the optimizer's state of a fragment."""
        for kind, value in state.items():
            if is_elementwise(value, fragment.buffer):
                self._add(fragment, kind, fragment.part(value))
            else:
                self._add_other(fragment.name, kind, state)

    def add_scaler(self, scaler: Any) -> None:
        """Ask for the dynamic loss scale; a checkpoint of another precision has none, and ours then stays as it is."""
        if self.source.shape(SCALER, SCALER) is None:
            return
        values = torch.zeros(len(SCALER_FIELDS), dtype=torch.float64)
        self.requests.append(StateRequest(SCALER, SCALER, 0, values))
        self.after.append(lambda: _set_scaler(scaler, values))

    def carry_out(self, alike: Axis) -> None:
        """Read, agree, share. alike: the ranks whose requests are the same; a size of 1 where they are not."""
        owners = _deal(self.requests, alike.size)
        mine = [request for request, owner in zip(self.requests, owners, strict=True) if owner == alike.rank]
        agree(self.problems or _read(self.source, mine), self.mesh)
        if alike.size > 1:
            for request, owner in zip(self.requests, owners, strict=True):
                _broadcast(request.target, owner, alike, self.mesh.device)
        for action in self.after:
            action()

    def _add(self, fragment: Fragment, kind: str, target: Tensor) -> None:
        spec, tp = get_spec(fragment.parameter), self.mesh.tp
        if self._fits(fragment.name, kind, full_shape(fragment.shape, spec, tp.size)):
            shard = (0, 1) if spec.dim is None else (tp.rank, tp.size)
            self.requests.append(StateRequest(fragment.name, kind, fragment.start, target, shard, spec))

    def _add_other(self, name: str, kind: str, state: dict[str, Any]) -> None:
        """Ask for an entry that is not elementwise (a step count, an accumulator), in the form that it has now."""
        value = state[kind]
        live = torch.as_tensor(value)
        stored = self.source.shape(name, kind)
        if stored is not None and torch.Size(stored).numel() == live.numel():
            saved = torch.empty(live.numel(), dtype=self.source.dtype(name, kind))
            self.requests.append(StateRequest(name, kind, 0, saved))
            self.after.append(lambda: state.__setitem__(kind, _in_the_form_of(value, saved)))
        else:
            self._fits(name, kind, tuple(live.shape))

    def _fits(self, name: str, kind: str, expected: tuple[int, ...]) -> bool:
        stored = self.source.shape(name, kind)
        if stored is None:
            self.problems.append(_missing(name, kind))
        elif tuple(stored) != expected:
            self.problems.append(_misshapen(name, kind, list(stored), list(expected)))
        return stored is not None and tuple(stored) == expected


def _deal(requests: Sequence[StateRequest], ranks: int) -> list[int]:
    """Return who reads each request: the largest first, each to whoever has least so far."""
    owners, loads = [0] * len(requests), [0] * ranks
    for index in sorted(range(len(requests)), key=lambda index: -requests[index].target.numel()):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += requests[index].target.numel()
    return owners


def _read(source: StateSource, requests: Sequence[StateRequest]) -> CheckpointError | None:
    """Fill the requests; return what stood against it."""
    try:
        source.fill(requests)
    except CheckpointError as error:
        return error
    return None


def _broadcast(target: Tensor, owner: int, axis: Axis, device: torch.device) -> None:
    """Give the owner's values, bit by bit, to all ranks of the axis. What lies elsewhere goes over the device."""
    values = target.detach().view(torch.uint8)
    moved = values if values.device.type == device.type else values.to(device)
    dist.broadcast(moved, group=axis.group, group_src=owner)
    if moved is not values:
        values.copy_(moved)


def _in_the_form_of(value: Any, saved: Tensor) -> Any:
    """Return a stored entry as the optimizer keeps it: a number, or a tensor on its device."""
    if not isinstance(value, Tensor):
        return type(value)(saved.item())
    return saved.reshape(value.shape).to(dtype=value.dtype, device=value.device, copy=True)


def _set_scaler(scaler: Any, values: Tensor) -> None:
    for name, value in zip(SCALER_FIELDS, values.tolist(), strict=True):
        live = getattr(scaler, name)  # a scalar on the device in our own, a number in DeepSpeed's
        number = value if name == "cur_scale" else int(value)
        if isinstance(live, Tensor):
            live.fill_(number)
        else:
            setattr(scaler, name, number)


def _missing(name: str, kind: str) -> Problem:
    if kind == "weight":
        return Problem(f"{name}: no weight", "the checkpoint has none.", "Is it a checkpoint of another model?")
    return Problem(
        what=f"{name}: no {kind}",
        why="the checkpoint was saved without it, or by another optimizer.",
        fix="Set no_load_optim: true to load the weights alone and start the optimizer afresh.",
    )


def _misshapen(name: str, kind: str, found: list[int], expected: list[int]) -> Problem:
    return Problem(
        what=f"{name} ({kind}) has shape {found} in the checkpoint",
        why=f"this model's is {expected}.",
        fix="Load it with the configuration that is saved beside the checkpoint.",
    )


def agree(found: Sequence[Problem] | CheckpointError | None, mesh: Mesh) -> None:
    """Raise on every rank what any rank found: DamagedCheckpointError where that is damage. All ranks must call it."""
    error = found if isinstance(found, CheckpointError) else CheckpointError(*found) if found else None
    errors = [error]
    if mesh.world.size > 1:
        failed = torch.tensor(int(error is not None), device=mesh.device)
        dist.all_reduce(failed, group=mesh.world.group)
        if failed.item():
            errors = [None] * mesh.world.size
            dist.all_gather_object(errors, error, group=mesh.world.group)
    damage = [error for error in errors if isinstance(error, DamagedCheckpointError)]
    problems = list(dict.fromkeys(_listed(damage or [error for error in errors if error is not None])))
    shown = problems[:_MOST_NAMED]
    if len(problems) > len(shown):
        shown.append(Problem(f"{len(problems) - len(shown)} more tensors", "as above.", ""))
    if shown:
        raise (DamagedCheckpointError if damage else CheckpointError)(*shown)


def _listed(errors: Sequence[CheckpointError]) -> Iterator[Problem]:
    for error in errors:
        yield from error.problems
