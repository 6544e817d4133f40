"""The engine's state as StatePieces, and back: what a checkpoint holds, whatever the ZeRO stage.

Kinds: "weight" in the model's dtype; "master" where the model is not fp32; each entry of the optimizer's state
under its own name ("exp_avg", "exp_avg_sq", "step" ...), scalars as tensors of shape () that belong to whoever owns the
parameter's first element; and ("loss_scaler", "loss_scaler") for fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.engine.base import ReadTensor
from megatron.engine.fragments import Fragment, flat_groups, is_elementwise, state_of
from megatron.errors import CheckpointError, Problem
from megatron.optim.build import initial_state
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece, get_spec, split

SCALER = "loss_scaler"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def make_states(optimizer: Any, afresh: bool = False) -> None:
    """Give every flat buffer the state of step 0 where it has none yet; `afresh` replaces what it has."""
    inner = optimizer.optimizer
    for flat, group in flat_groups(optimizer):
        if afresh or not inner.state.get(flat):
            inner.state[flat] = initial_state(inner, flat.detach(), group)


def pieces(optimizer: Any, owned: Sequence[Fragment], mesh: Mesh) -> Iterator[StatePiece]:
    """Yield the pieces that this rank owns; `data` are views of the live tensors."""
    for fragment in owned:
        yield _piece(fragment, "weight", fragment.weight, mesh)
        if fragment.weight.dtype != torch.float32:
            yield _piece(fragment, "master", fragment.master, mesh)
        for kind, value in state_of(optimizer, fragment.flat).items():
            if is_elementwise(value, fragment.flat):
                yield _piece(fragment, kind, value.narrow(0, fragment.offset, fragment.numel), mesh)
            elif fragment.start == 0 and mesh.tp.rank == 0:
                scalar = torch.as_tensor(value).detach().reshape(1)
                yield StatePiece(name=fragment.name, kind=kind, shape=(), start=0, data=scalar)
    scaler = _dynamic_scaler(optimizer)
    if scaler is not None and mesh.world.rank == 0:
        values = torch.tensor([float(getattr(scaler, field)) for field in _SCALER_FIELDS], dtype=torch.float64)
        yield StatePiece(name=SCALER, kind=SCALER, shape=(len(_SCALER_FIELDS),), start=0, data=values)


@torch.no_grad()
def fill(
    optimizer: Any, owned: Sequence[Fragment], mesh: Mesh, read: ReadTensor, with_optimizer: bool
) -> list[Problem]:
    """Fill this rank's masters, and its optimizer state where `with_optimizer`; weights are not touched yet.

    Returns what is missing or of another shape, so that all ranks can agree before they go on.
    """
    problems: list[Problem] = []
    for fragment in owned:
        kinds = ("master", "weight") if with_optimizer else ("weight",)
        _copy(fragment.master, fragment, kinds, mesh, read, problems)
    make_states(optimizer, afresh=True)
    if not with_optimizer:
        return problems
    for fragment in owned:
        state = state_of(optimizer, fragment.flat)
        for kind, value in state.items():
            if is_elementwise(value, fragment.flat):
                target = value.narrow(0, fragment.offset, fragment.numel)
                _copy(target, fragment, (kind,), mesh, read, problems)
            else:
                state[kind] = _scalar(value, fragment.name, kind, read, problems)
    _fill_scaler(optimizer, read)
    return problems


def _piece(fragment: Fragment, kind: str, data: Tensor, mesh: Mesh) -> StatePiece:
    return StatePiece(
        name=fragment.name,
        kind=kind,
        shape=fragment.shape,
        start=fragment.start,
        data=data,
        shard=(mesh.tp.rank, mesh.tp.size),
        spec=get_spec(fragment.parameter),
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
        problems.append(
            Problem(
                what=f"{fragment.name} ({kinds[-1]}) has shape {list(full.shape)} in the checkpoint",
                why=f"this model's is {expected}.",
                fix="Load it with the configuration that is saved beside the checkpoint.",
            )
        )
        return
    target.copy_(fragment.select(split(full, spec, mesh.tp.size, mesh.tp.rank)))


def _scalar(value: Any, name: str, kind: str, read: ReadTensor, problems: list[Problem]) -> Any:
    """Return the checkpoint's scalar in the form that the optimizer keeps `value` in."""
    saved = read(name, kind)
    if saved is None:
        problems.append(_missing(name, kind))
        return value
    if isinstance(value, Tensor):
        return saved.reshape(value.shape).to(dtype=value.dtype, device=value.device, copy=True)
    return type(value)(saved.item())


def _missing(name: str, kind: str) -> Problem:
    if kind == "weight":
        return Problem(f"{name}: no weight", "the checkpoint has none.", "Is it a checkpoint of another model?")
    return Problem(
        what=f"{name}: no {kind}",
        why="the checkpoint was saved without it, or by another optimizer.",
        fix='Set "no_load_optim": true to load the weights alone and start the optimizer afresh.',
    )


def _dynamic_scaler(optimizer: Any) -> Any | None:
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _fill_scaler(optimizer: Any, read: ReadTensor) -> None:
    """Restore the dynamic loss scale; a checkpoint of another precision has none, and ours then starts afresh."""
    scaler = _dynamic_scaler(optimizer)
    values = None if scaler is None else read(SCALER, SCALER)
    if values is None:
        return
    for field, value in zip(_SCALER_FIELDS, values.tolist(), strict=True):
        setattr(scaler, field, value if field == "cur_scale" else int(value))


def summarise(problems: Sequence[Problem], ranks_with_problems: int) -> CheckpointError:
    """Return one error for what the ranks found: at most 20 of the problems, and the number of the rest."""
    shown = list(problems[:20])
    if len(problems) > len(shown):
        shown.append(Problem(f"{len(problems) - len(shown)} more tensors", "as above.", ""))
    if not shown:
        shown = [Problem(f"{ranks_with_problems} other ranks could not load", "see their messages.", "")]
    return CheckpointError(*shown)
