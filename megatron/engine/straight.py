"""Gradients go straight into the buffers that DeepSpeed's optimizers step from, and their memory stays.

DeepSpeed makes room for a step's gradients anew and copies them about: under ZeRO 1 and 2 into a bucket, out of it and
into one flat tensor, and BF16_Optimizer through an fp32 copy of each. What the optimizer is given is the same, to the
last bit:

    BF16_Optimizer                       its flat fp32 gradients, which stay: the first micro-batch is copied there
    ZeRO 1 and 2, in a world of one      a flat fp32 buffer of ours, since there is nothing to reduce

The second is handed over by the name that a compiled DeepSpeed uses for it, `flat_partition`, and its norm is taken as
our own engine takes it: DeepSpeed would copy each gradient to fp64 first.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron.ops.accumulate import accumulate
from megatron.ops.adamw import sum_of_squares
from megatron.parallel.mesh import Mesh


def send_straight(optimizer: Any, mesh: Mesh) -> None:
    """Make a live optimizer of DeepSpeed's take gradients without copies between; call it once, before training."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer._update_hp_grad = _Bf16Gradients(optimizer).take
    elif type(optimizer) is DeepSpeedZeroOptimizer and mesh.world.size == 1 and not optimizer.cpu_offload:
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
        optimizer.get_grad_norm_direct = self.norm
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

    def norm(self, gradients: list[Tensor], parameters: Any, norm_type: int = 2) -> Tensor:
        """Return the L2 norm of one group's gradients, fp32; -1 where it is not finite, as DeepSpeed has it."""
        norm = sum_of_squares(list(gradients)).sqrt().float()
        return torch.where(torch.isfinite(norm), norm, -torch.ones_like(norm))
