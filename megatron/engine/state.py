"""The engine's state as StatePieces: what a checkpoint holds, whatever engine and stage. `restore.py` is the way back.

Kinds: "weight" in the model's dtype; "master" where the model is not fp32; each entry of the optimizer's state
under its own name ("exp_avg", "exp_avg_sq", "step" ...). Entries that are not elementwise, such as step counts, belong
to whoever owns the parameter's first element. ("loss_scaler", "loss_scaler") holds the loss scale of fp16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.engine.fragments import Fragment, Holdings, is_elementwise
from megatron.optim.build import initial_state
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece, get_spec

SCALER = "loss_scaler"
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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
        values = torch.tensor([float(getattr(holdings.scaler, field)) for field in SCALER_FIELDS], dtype=torch.float64)
        yield StatePiece(SCALER, SCALER, shape=(len(SCALER_FIELDS),), start=0, data=values)


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
