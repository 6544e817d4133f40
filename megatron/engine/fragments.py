"""Which elements of which tensors this rank owns, for every ZeRO stage, in one vocabulary.

DeepSpeed flattens the parameters of a group and gives each data-parallel rank a slice of fp32 masters (stage 3: of
the parameters as well). A Fragment names one parameter's part of that slice: elements [start, start + numel) of the
parameter lie at `offset` of the flat master, and its optimizer state is laid out as the master is. With it, saving
and loading need to know nothing else about the stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from megatron.optim.base import State


@dataclass(frozen=True)
class Fragment:
    """One parameter's elements that this rank owns.

    shape: of the parameter on this tensor-parallel rank (the whole of it, not the fragment).
    weight: the fragment in the model's dtype, a view that is written through.
    flat: the fp32 master buffer that holds it at `offset`; the key of its optimizer state.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    weight: Tensor
    flat: Tensor
    offset: int

    @property
    def master(self) -> Tensor:
        """The fp32 values, flat; a view."""
        return self.flat.detach().narrow(0, self.offset, self.numel)

    def select(self, full: Tensor) -> Tensor:
        """Return this fragment's elements of a tensor of `shape`, flat."""
        return full.reshape(-1).narrow(0, self.start, self.numel)


def flat_groups(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return each flat master buffer of a DeepSpeed ZeRO optimizer with its torch parameter group."""
    inner = optimizer.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return [
            (flat, inner.param_groups[optimizer.sub_group_to_group_id[index]])
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat)
        ]
    return [(group["params"][0], group) for group in inner.param_groups]


def fragments(optimizer: Any, module: nn.Module) -> list[Fragment]:
    """Return all fragments of this rank, in the order of the flat buffers."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_stage3(optimizer, names))
    return list(_stage1_or_2(optimizer, names))


def _stage1_or_2(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    groups = optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups
    for parameters, (flat, _) in zip(groups, flat_groups(optimizer), strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it belongs to other ranks
                continue
            where, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            yield Fragment(
                name=names[id(parameter)],
                parameter=parameter,
                shape=tuple(parameter.shape),
                start=where.start,
                numel=where.numel,
                weight=parameter.data.view(-1).narrow(0, where.start, where.numel),
                flat=flat,
                offset=place.start,
            )


def _stage3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for parameters, (flat, _) in zip(optimizer.fp16_groups, flat_groups(optimizer), strict=True):
        for parameter in parameters:
            _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * share
            numel = min(share, parameter.ds_numel - start)  # the last shares are padded
            if numel <= 0:
                continue
            yield Fragment(
                name=names[id(parameter)],
                parameter=parameter,
                shape=tuple(parameter.ds_shape),
                start=start,
                numel=numel,
                weight=parameter.ds_tensor.data.view(-1).narrow(0, 0, numel),
                flat=flat,
                offset=offset,
            )


def state_of(optimizer: Any, flat: Tensor) -> State:
    """Return the optimizer state of a flat master buffer: elementwise tensors of its length, and scalars."""
    state: State = optimizer.optimizer.state[flat]
    return state


def is_elementwise(value: Any, flat: Tensor) -> bool:
    """Return whether a state entry has one value for each element of its flat buffer."""
    return isinstance(value, Tensor) and value.ndim == 1 and value.numel() == flat.numel()


@torch.no_grad()
def publish_masters(optimizer: Any) -> None:
    """Round the fp32 masters into the model's weights, on every rank; all ranks must call it."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
