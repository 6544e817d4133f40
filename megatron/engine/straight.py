"""Gradients go straight into the buffers that DeepSpeed's optimizers step from, and their memory stays.

DeepSpeed makes room for a step's gradients anew and copies them about: under ZeRO 1 and 2 into a bucket, out of it and
into one flat tensor, and BF16_Optimizer through an fp32 copy of each. What the optimizer is given is the same, to the
last bit:

    BF16_Optimizer                       its flat fp32 gradients, which stay: the first micro-batch is copied there
    ZeRO 1 and 2, in a world of one      a flat fp32 buffer of ours, since there is nothing to reduce
    ZeRO 3, in a world of one            its flat gradients, which stay, and which the update reads where they are; of
                                         one micro-batch autograd's own, if the update is ours (`one_update.py`)

The second is handed over by the name that a compiled DeepSpeed uses for it, `flat_partition`, and norms of the second
and third are taken as our own engine takes them: DeepSpeed would copy each gradient to fp64 first.

A weight that a backward pass does not use has a zero gradient in it, as in our own engine. DeepSpeed does so too, but
for its ZeRO 3, where the gradient of an earlier step would be applied again.

In fp32, ZeRO has masters beside weights that are the same numbers, in any world; here they are the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron.engine.one_update import OneUpdate
from megatron.engine.stage3_gradients import FlatGradients, OwnGradients, Zeros, norm_by
from megatron.ops.accumulate import accumulate
from megatron.ops.adamw import sum_of_squares
from megatron.ops.choice import Function
from megatron.parallel.mesh import Mesh


def send_straight(optimizer: Any, mesh: Mesh, update: OneUpdate | None, num_micro_batches: int) -> None:
    """Make a live optimizer of DeepSpeed's take gradients without copies between; call it once, before training.

    update: what updates its masters, or None for DeepSpeed's own way. num_micro_batches: of a step.
    """
    kind = type(optimizer)
    is_alone = mesh.world.size == 1 and (
        getattr(optimizer, "communication_data_type", None) in (torch.float32, getattr(optimizer, "dtype", None))
    )  # nothing is reduced, or asked to be rounded
    if kind is BF16_Optimizer:
        optimizer._update_hp_grad = _Bf16Gradients(optimizer).take
    elif kind is DeepSpeedZeroOptimizer and not optimizer.cpu_offload:
        _share_partitions(optimizer)
        if is_alone:
            _FlatPartitions(optimizer, update.squares if update else sum_of_squares)
    elif kind is DeepSpeedZeroOptimizer_Stage3 and optimizer.offload_optimizer:
        Zeros(optimizer, mesh.device)
    elif kind is DeepSpeedZeroOptimizer_Stage3:
        _share_masters(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
        _send_stage3(optimizer, mesh, update, is_alone, num_micro_batches)


def _send_stage3(optimizer: Any, mesh: Mesh, update: OneUpdate | None, is_alone: bool, num_micro_batches: int) -> None:
    looks_for_overflows = optimizer.dtype == torch.float16  # in its flat gradients
    if not is_alone:
        Zeros(optimizer, mesh.device)
    elif update and num_micro_batches == 1 and not looks_for_overflows:
        OwnGradients(optimizer, update)
    else:
        FlatGradients(optimizer, update.squares if update else sum_of_squares)


class _Bf16Gradients:
    """The fp32 gradients of a BF16_Optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @torch.no_grad()
    def take(self, weight: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add a weight's gradient to its sum in fp32, and free it; in the place of `_update_hp_grad`."""
        if weight.grad is None:
            return
        total, has_some = self._optimizer.fp32_groups_gradients[group][index], self._optimizer.fp32_groups_has_gradients
        accumulate(total, weight.grad.view(total.shape), is_first=not has_some[group][index])
        weight._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed and `partial.py` look for it
        has_some[group][index] = True
        weight.grad = None


class _FlatPartitions:
    """A flat fp32 buffer for each group of a ZeRO 1 or 2 optimizer, filled as the backward pass makes gradients.

    DeepSpeed asks for the buffers at the end of the last backward pass of a step, and forgets them after its update.
    """

    def __init__(self, optimizer: Any, squares: Function) -> None:
        self._optimizer = optimizer
        self._groups = [optimizer._build_compact_grad_partition_buffer(i) for i in range(len(optimizer.bit16_groups))]
        self._sums: dict[int, Tensor] = {}
        for group, parameters in zip(self._groups, optimizer.bit16_groups, strict=True):
            sums = [part for part in group if not getattr(part, "_zero_padding", False)]
            self._sums |= {id(p): part for p, part in zip(parameters, sums, strict=True)}
        self._written: set[int] = set()
        optimizer.process_gradients = self.take
        optimizer.get_grad_norm_direct = norm_by(squares)
        optimizer.reduce_ipg_grads = lambda comm_dtype=None: None  # no bucket is filled
        optimizer._use_compact_grad_partition_buffer = lambda group: True
        optimizer._build_compact_grad_partition_buffer = self.of_step

    @torch.no_grad()
    def take(self, weight: nn.Parameter, group: int) -> None:
        """Add a weight's gradient to its sum, and free it; in the place of `process_gradients`, after each gradient."""
        if weight.grad is not None:
            accumulate(self._sums[id(weight)], weight.grad, is_first=id(weight) not in self._written)
            self._written.add(id(weight))
            weight.grad = None

    @torch.no_grad()
    def of_step(self, group: int) -> Any:
        """Return the sums of one group, of all micro-batches; the next gradients begin new ones."""
        for weight in self._optimizer.bit16_groups[group]:
            if id(weight) not in self._written:
                self._sums[id(weight)].zero_()
            self._written.discard(id(weight))
        return self._groups[group]


def _share_masters(masters: list[Tensor], weights: list[Tensor | None]) -> None:
    """Let flat masters be the weights' memory, where both are fp32."""
    for master, rounded in zip(masters, weights, strict=True):
        if rounded is not None and (rounded.dtype, rounded.device) == (master.dtype, master.device):
            master.data = rounded.data


def _share_partitions(optimizer: Any) -> None:
    """The same for ZeRO 1 and 2, whose parameters know where their masters are."""
    masters = optimizer.single_partition_of_fp32_groups
    shares = zip(optimizer.parallel_partitioned_bit16_groups, optimizer.real_dp_process_group, strict=True)
    _share_masters(masters, [parts[dist.get_rank(group)] for parts, group in shares])
    for master, parameters in zip(masters, optimizer.bit16_groups, strict=True):
        for mapping in (p._hp_mapping for p in parameters if p._hp_mapping is not None):
            place = mapping.get_hp_fragment_address()
            mapping.hp_fragment = master.detach().narrow(0, place.start, place.numel)
