"""Gradients go straight into the buffers that DeepSpeed's optimizers step from, and their memory stays.

DeepSpeed makes room for a step's gradients anew and copies them about: under ZeRO 1 and 2 into a bucket, out of it and
into one flat tensor, and BF16_Optimizer through an fp32 copy of each. What the optimizer is given is the same, to the
last bit:

    BF16_Optimizer                       its flat fp32 gradients, which stay: the first micro-batch is copied there
    ZeRO 1 and 2, in a world of one      a flat fp32 buffer of ours, since there is nothing to reduce
    ZeRO 3, in a world of one            its flat gradients, which stay, and which the update reads where they are

The second is handed over by the name that a compiled DeepSpeed uses for it, `flat_partition`, and norms of the second
and third are taken as our own engine takes them: DeepSpeed would copy each gradient to fp64 first.

A weight that a backward pass does not use has a zero gradient in it, as in our own engine. DeepSpeed does so too, but
for its ZeRO 3, where the gradient of an earlier step would be applied again.

ZeRO 3 in fp32 has masters beside weights that are the same numbers, in any world; here they are the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron.ops.accumulate import accumulate
from megatron.ops.adamw import sum_of_squares
from megatron.parallel.mesh import Mesh


def send_straight(optimizer: Any, mesh: Mesh) -> None:
    """Make a live optimizer of DeepSpeed's take gradients without copies between; call it once, before training."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer._update_hp_grad = _Bf16Gradients(optimizer).take
        return
    is_stage3 = type(optimizer) is DeepSpeedZeroOptimizer_Stage3
    if is_stage3 and not optimizer.offload_optimizer:
        _share_masters(optimizer)
    is_alone = mesh.world.size == 1 and optimizer.communication_data_type in (torch.float32, optimizer.dtype)
    if is_stage3 and not (is_alone and not optimizer.offload_optimizer):
        _Stage3Zeros(optimizer, mesh.device)
    elif not is_alone:
        return  # gradients are reduced, or asked to be rounded
    elif is_stage3:
        _Stage3Gradients(optimizer)
    elif type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload:
        _FlatGradients(optimizer)


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


class _FlatGradients:
    """A flat fp32 buffer for each group of a ZeRO 1 or 2 optimizer, filled as the backward pass makes gradients.

    DeepSpeed asks for the buffers at the end of the last backward pass of a step, and forgets them after its update.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._groups = [optimizer._build_compact_grad_partition_buffer(i) for i in range(len(optimizer.bit16_groups))]
        self._sums: dict[int, Tensor] = {}
        for group, parameters in zip(self._groups, optimizer.bit16_groups, strict=True):
            sums = [part for part in group if not getattr(part, "_zero_padding", False)]
            self._sums |= {id(p): part for p, part in zip(parameters, sums, strict=True)}
        self._written: set[int] = set()
        optimizer.process_gradients = self.take
        optimizer.get_grad_norm_direct = norm
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


class _Stage3Gradients:
    """The flat gradients of a ZeRO 3 optimizer, whose shares are whole, filled as the backward pass makes gradients."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        groups: list[list[Any]] = optimizer.fp16_groups
        sizes = [sum(p.partition_numel() for p in group) for group in groups]
        self._groups = optimizer.grad_partitions_flat_buffer.split(sizes)
        self._sums: dict[int, Tensor] = {}
        for group, flat in zip(groups, self._groups, strict=True):
            parts = flat.split([p.partition_numel() for p in group])
            self._sums |= {id(p): part for p, part in zip(group, parts, strict=True)}
        self._written: set[int] = set()
        self._finish, self._begin_step = optimizer.independent_gradient_partition_epilogue, optimizer._pre_step
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = self.take
        optimizer.independent_gradient_partition_epilogue = self.finish
        optimizer.get_grad_norm_direct = norm
        optimizer._pre_step = self.begin_step
        optimizer._prepare_fp32_grad_for_sub_group = self.hand_over
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None  # no bucket is filled

    @torch.no_grad()
    def take(self, weight: nn.Parameter) -> None:
        """Add a weight's gradient to its sum, and free it; after each gradient, in the place of what fills buckets."""
        if weight.grad is not None:
            part = weight.grad.reshape(-1)
            accumulate(self._sums[id(weight)], part, is_first=id(weight) not in self._written)
            self._written.add(id(weight))
            weight.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """End a backward pass. What had no gradient in it has 0, where DeepSpeed would leave that of the last step."""
        for weight, total in self._sums.items():
            if weight not in self._written:
                total.zero_()
        self._written.update(self._sums)
        self._finish()

    def begin_step(self) -> None:
        """Let the next gradients begin new sums; at the beginning of the optimizer's step."""
        self._written.clear()
        self._begin_step()

    def hand_over(self, group: int) -> None:
        """Give the sums of one group to its masters, which `unscale_and_clip_grads` scales where they are."""
        master = self._optimizer.fp32_partitioned_groups_flat[group]
        master.grad = self._groups[group].to(master.dtype)
        self._optimizer.averaged_gradients[group] = None


class _Stage3Zeros:
    """A zero gradient for every weight that a backward pass gave none.

    A ZeRO 3 optimizer would apply the gradient of its last step again, or, of an offloaded optimizer, forget the
    micro-batches before."""

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._weights = [weight for group in optimizer.fp16_groups for weight in group if weight.requires_grad]
        self._micro_step = 0
        self._written: set[int] = set()  # in this micro-step
        self._partition, self._begin_step = optimizer.partition_grads, optimizer._pre_step
        self._finish = optimizer.independent_gradient_partition_epilogue
        optimizer.partition_grads = self.take
        optimizer.independent_gradient_partition_epilogue = self.finish
        optimizer._pre_step = self.begin_step

    def take(self, weights: list[Any], parts: list[Tensor]) -> Any:
        """Note whose gradients are there; in the place of what copies or adds them to the sums."""
        if self._optimizer.micro_step_id != self._micro_step:
            self._micro_step = self._optimizer.micro_step_id
            self._written.clear()
        self._written.update(id(weight) for weight in weights)
        return self._partition(weights, parts)

    @torch.no_grad()
    def finish(self) -> None:
        """End a backward pass, in the middle of which the last bucket may still be full."""
        self._finish()
        weights = [weight for weight in self._weights if id(weight) not in self._written]
        if weights:
            dtype = self._optimizer.gradient_accumulation_dtype
            zeros = [torch.zeros(w.partition_numel(), dtype=dtype, device=self._device) for w in weights]
            self.take(weights, zeros)

    def begin_step(self) -> None:
        """Let the next gradients begin new sums; at the beginning of the optimizer's step."""
        self._written.clear()
        self._begin_step()


def _share_masters(optimizer: Any) -> None:
    """Let the masters of a ZeRO 3 optimizer be its weights, where both are fp32."""
    for master, weights in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
    ):
        if weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device):
            master.data = weights.data


def norm(gradients: list[Tensor], parameters: Any, norm_type: int = 2) -> Tensor:
    """Return the L2 norm of one group's gradients, fp32; -1 where it is not finite, as DeepSpeed has it."""
    found = sum_of_squares(list(gradients)).sqrt().float()
    return torch.where(torch.isfinite(found), found, -torch.ones_like(found))
