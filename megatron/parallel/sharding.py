"""How one parameter is laid over the tensor-parallel axis, and how pieces of it are named.

A ShardSpec is attached to every parameter and is the single source for initialisation, parallel layers,
gradient synchronisation, norms, checkpoints, re-sharding and export. With `blocks` > 1 the dim holds that many
equal blocks, each of which is split on its own: the [value; gate] halves of a gated linear1 on 2 ranks become
[value_0; gate_0] and [value_1; gate_1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ATTRIBUTE = "shard_spec"


@dataclass(frozen=True)
class ShardSpec:
    """dim: the split dim, or None for a replicated parameter.
    blocks: equal parts of that dim that are split separately.
    sequence_partial: the gradient of a replicated parameter is partial where activations are split over the
        sequence, and must be summed over the tensor axis.
    tensor_partial: it is partial in any case, since each rank uses the parameter for its own heads or features.
    """

    dim: int | None = None
    blocks: int = 1
    sequence_partial: bool = False
    tensor_partial: bool = False


REPLICATED = ShardSpec()


def set_spec(parameter: nn.Parameter, spec: ShardSpec) -> None:
    """Attach `spec`; a split parameter also gets `tensor_model_parallel`, from which DeepSpeed computes its norm."""
    setattr(parameter, _ATTRIBUTE, spec)
    parameter.tensor_model_parallel = spec.dim is not None  # type: ignore[attr-defined]


def get_spec(parameter: Tensor) -> ShardSpec:
    """Return the parameter's spec; a parameter without one is replicated."""
    spec: ShardSpec = getattr(parameter, _ATTRIBUTE, REPLICATED)
    return spec


def split(full: Tensor, spec: ShardSpec, size: int, rank: int) -> Tensor:
    """Return rank's contiguous share of the full tensor on an axis of `size`.

    Raises ValueError where the dim is not a multiple of blocks * size.
    """
    if spec.dim is None or size == 1:
        return full
    length = full.shape[spec.dim]
    if length % (spec.blocks * size):
        raise ValueError(f"dim {spec.dim} of {tuple(full.shape)} does not split into {spec.blocks} x {size}")
    blocks = full.chunk(spec.blocks, dim=spec.dim)
    return torch.cat([block.chunk(size, dim=spec.dim)[rank] for block in blocks], dim=spec.dim).contiguous()


def merge(pieces: Sequence[Tensor], spec: ShardSpec) -> Tensor:
    """Return the full tensor of the shares of all ranks in order; the inverse of `split`."""
    if spec.dim is None or len(pieces) == 1:
        return pieces[0]
    blocks = [piece.chunk(spec.blocks, dim=spec.dim) for piece in pieces]
    ordered = [blocks[rank][block] for block in range(spec.blocks) for rank in range(len(pieces))]
    return torch.cat(ordered, dim=spec.dim).contiguous()


def local_shape(shape: Sequence[int], spec: ShardSpec, size: int) -> tuple[int, ...]:
    """Return the shape of one rank's share of a tensor of the full `shape`."""
    local = list(shape)
    if spec.dim is not None:
        local[spec.dim] //= size
    return tuple(local)


def full_shape(shape: Sequence[int], spec: ShardSpec, size: int) -> tuple[int, ...]:
    """Return the shape of the full tensor of which one rank's share has `shape`; the inverse of `local_shape`."""
    full = list(shape)
    if spec.dim is not None:
        full[spec.dim] *= size
    return tuple(full)


@dataclass(frozen=True)
class StatePiece:
    """A contiguous flat range of one tensor of the training state, owned by exactly one rank.

    name: canonical parameter name.
    kind: "weight", "master" (the fp32 copy) or an optimizer state such as "exp_avg".
    shape: the shape of the tensor that `start` counts in: the full tensor, or the share `shard` of it.
    start: first element of the range, flat; `data` holds elements [start, start + data.numel()).
    data: the values, flat.
    shard: (rank, size) on the tensor axis; (0, 1) is the full tensor.
    spec: how the full tensor is split over that axis.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    shard: tuple[int, int] = (0, 1)
    spec: ShardSpec = REPLICATED


@dataclass(frozen=True)
class StateRequest:
    """A contiguous flat range of one tensor of the training state, and where it is to be written: StatePiece, back.

    name, kind: as in StatePiece.
    start: first element of the range in the flat share `shard` of the full tensor.
    target: flat, of any dtype, on any device; it is filled with elements [start, start + target.numel()).
    shard: (rank, size) on the tensor axis; (0, 1) asks for a range of the full tensor.
    spec: how the full tensor is split over that axis.
    """

    name: str
    kind: str
    start: int
    target: Tensor
    shard: tuple[int, int] = (0, 1)
    spec: ShardSpec = REPLICATED
