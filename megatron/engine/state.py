"""The engine's state as StatePieces, and back: what a checkpoint holds, whatever the engine or ZeRO stage.

Kinds: "weight" in the model's dtype; "master" where the model is not fp32; each entry of the optimizer's state
under its own name ("exp_avg", "exp_avg_sq", "step" ...). Entries that are not elementwise, such as step counts, belong
to whoever owns the parameter's first element. ("loss_scaler", "loss_scaler") holds the loss scale of fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.base import ReadTensor
from megatron.engine.fragments import Fragment, Holdings, is_elementwise
from megatron.errors import CheckpointError, Problem
from megatron.optim.build import initial_state
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece, get_spec, split

SCALER = "loss_scaler"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def make_states(holdings: Holdings, afresh: bool = False) -> None:
    """Give every buffer the optimizer state of step 0 where it has none yet; `afresh` replaces what it has."""
    for buffer, group in holdings.buffers:
        if afresh or not holdings.optimizer.state.get(buffer):
            holdings.optimizer.state[buffer] = initial_state(holdings.optimizer, buffer.detach(), group)


def pieces(holdings: Holdings, mesh: Mesh) -> Iterator[StatePiece]:
    """Yield the pieces that this rank owns; `data` are views of the live tensors.

    Of parameters that the tensor axis replicates, its first rank owns all."""
    for fragment in holdings.owned:
        if mesh.tp.rank and get_spec(fragment.parameter).dim is None:
            continue
        yield _piece(fragment, "weight", fragment.weight, mesh)
        if fragment.weight.dtype != torch.float32:
            yield _piece(fragment, "master", fragment.master, mesh)
        for kind, value in holdings.state(fragment.buffer).items():
            if is_elementwise(value, fragment.buffer):
                yield _piece(fragment, kind, fragment.part(value), mesh)
            elif fragment.start == 0 and mesh.tp.rank == 0:
                data = torch.as_tensor(value).detach()
                yield StatePiece(fragment.name, kind, shape=tuple(data.shape), start=0, data=data.reshape(-1))
    if holdings.scaler is not None and mesh.world.rank == 0:
        values = torch.tensor([float(getattr(holdings.scaler, field)) for field in _SCALER_FIELDS], dtype=torch.float64)
        yield StatePiece(SCALER, SCALER, shape=(len(_SCALER_FIELDS),), start=0, data=values)


@torch.no_grad()
def fill(holdings: Holdings, mesh: Mesh, read: ReadTensor, with_optimizer: bool) -> list[Problem]:
    """Fill this rank's masters, and its optimizer state where `with_optimizer`; weights are not touched yet.

    Returns what is missing or of another shape, so that all ranks can agree before they go on.
    """
    problems: list[Problem] = []
    for fragment in holdings.held:
        kinds = ("master", "weight") if with_optimizer else ("weight",)
        _copy(fragment.master, fragment, kinds, mesh, read, problems)
    make_states(holdings, afresh=True)
    if not with_optimizer:
        return problems
    for fragment in holdings.held:
        state = holdings.state(fragment.buffer)
        for kind, value in state.items():
            if is_elementwise(value, fragment.buffer):
                _copy(fragment.part(value), fragment, (kind,), mesh, read, problems)
            else:
                state[kind] = _other(value, fragment.name, kind, read, problems)
    _fill_scaler(holdings.scaler, read)
    return problems


def _piece(fragment: Fragment, kind: str, data: Tensor, mesh: Mesh) -> StatePiece:
    spec = get_spec(fragment.parameter)
    return StatePiece(
        name=fragment.name,
        kind=kind,
        shape=fragment.shape,
        start=fragment.start,
        data=data,
        shard=(0, 1) if spec.dim is None else (mesh.tp.rank, mesh.tp.size),
        spec=spec,
    )


def _copy(
    target: Tensor, fragment: Fragment, kinds: Sequence[str], mesh: Mesh, read: ReadTensor, problems: list[Problem]
) -> None:
    """Copy this fragment's part of the first of `kinds` that exists into `target`."""
    full = next((tensor for kind in kinds if (tensor := read(fragment.name, kind)) is not None), None)
    if full is None:
        problems.append(_missing(fragment.name, kinds[-1]))
        return
    spec = get_spec(fragment.parameter)
    expected = list(fragment.shape)
    if spec.dim is not None:
        expected[spec.dim] *= mesh.tp.size
    if list(full.shape) != expected:
        problems.append(_misshapen(fragment.name, kinds[-1], list(full.shape), expected))
        return
    target.copy_(fragment.select(split(full, spec, mesh.tp.size, mesh.tp.rank)))


def _other(value: Any, name: str, kind: str, read: ReadTensor, problems: list[Problem]) -> Any:
    """Return the checkpoint's entry (a step count, an accumulator) in the form that the optimizer keeps `value` in."""
    saved = read(name, kind)
    if saved is None:
        problems.append(_missing(name, kind))
        return value
    if not isinstance(value, Tensor):
        return type(value)(saved.item())
    if saved.numel() != value.numel():
        problems.append(_misshapen(name, kind, list(saved.shape), list(value.shape)))
        return value
    return saved.reshape(value.shape).to(dtype=value.dtype, device=value.device, copy=True)


def _missing(name: str, kind: str) -> Problem:
    if kind == "weight":
        return Problem(f"{name}: no weight", "the checkpoint has none.", "Is it a checkpoint of another model?")
    return Problem(
        what=f"{name}: no {kind}",
        why="the checkpoint was saved without it, or by another optimizer.",
        fix='Set "no_load_optim": true to load the weights alone and start the optimizer afresh.',
    )


def _misshapen(name: str, kind: str, found: list[int], expected: list[int]) -> Problem:
    return Problem(
        what=f"{name} ({kind}) has shape {found} in the checkpoint",
        why=f"this model's is {expected}.",
        fix="Load it with the configuration that is saved beside the checkpoint.",
    )


def _fill_scaler(scaler: Any | None, read: ReadTensor) -> None:
    """Restore the dynamic loss scale; a checkpoint of another precision has none, and ours then starts afresh."""
    values = None if scaler is None else read(SCALER, SCALER)
    if values is None:
        return
    for field, value in zip(_SCALER_FIELDS, values.tolist(), strict=True):
        live = getattr(scaler, field)  # a scalar on the device in our own, a number in DeepSpeed's
        number = value if field == "cur_scale" else int(value)
        setattr(scaler, field, torch.full_like(live, number) if isinstance(live, Tensor) else number)


def agree(problems: Sequence[Problem], mesh: Mesh) -> None:
    """Raise CheckpointError on every rank where any rank could not load; all ranks must call it."""
    failed = torch.tensor(float(bool(problems)), device=mesh.device)
    if mesh.world.group is not None:
        dist.all_reduce(failed, group=mesh.world.group)
    if not failed.item():
        return
    shown = list(problems[:20])
    if len(problems) > len(shown):
        shown.append(Problem(f"{len(problems) - len(shown)} more tensors", "as above.", ""))
    if not shown:
        shown = [Problem(f"{int(failed)} other ranks could not load", "their messages say why.", "")]
    raise CheckpointError(*shown)
