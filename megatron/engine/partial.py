"""Gradients that are partial on each tensor-parallel rank, made whole under DeepSpeed: one all-reduce at a time.

DeepSpeed hands a gradient to its reduction over the replicas as soon as it is complete. Partial ones (see
`parallel/grad_sync.py`) are held back here until the backward pass is over, summed over the tensor axis as one flat
fp32 tensor, and handed over then:

    ZeRO 1          once a step, the sum over all micro-batches
    ZeRO 2 and 3    once a micro-batch, since they shard the gradient of each
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megatron.parallel.collectives import TensorRegion, all_sum
from megatron.parallel.grad_sync import is_partial

_EPILOGUE, _REDUCE = "independent_gradient_partition_epilogue", "reduce_ready_partitions_and_remove_grads"


def sum_partial_gradients(live: Any, region: TensorRegion) -> None:
    """Make a live DeepSpeed engine sum partial gradients over the tensor axis before it reduces them.

    Call it once, after deepspeed.initialize."""
    partial = [p for p in live.module.parameters() if p.requires_grad and is_partial(p, region)]
    if not partial:
        return
    if isinstance(live.optimizer, BF16_Optimizer):
        _before_its_all_reduce(live, partial, region)
    else:
        _Waiting(live.optimizer, partial, region)


def _before_its_all_reduce(live: Any, partial: Iterable[nn.Parameter], region: TensorRegion) -> None:
    """For BF16_Optimizer, whose fp32 gradients the engine reduces once a step."""
    reduce = live.buffered_allreduce_fallback

    def summed(*arguments: Any, **settings: Any) -> None:
        held = (getattr(parameter, "_hp_grad", None) for parameter in partial)
        _sum_together([gradient for gradient in held if gradient is not None], region)
        reduce(*arguments, **settings)

    live.buffered_allreduce_fallback = summed


class _Waiting:
    """Holds partial gradients back from a ZeRO optimizer until the end of the backward pass."""

    def __init__(self, optimizer: Any, partial: Iterable[nn.Parameter], region: TensorRegion) -> None:
        self._optimizer = optimizer
        self._region = region
        self._ids = {id(parameter) for parameter in partial}
        self._waiting: list[tuple[nn.Parameter, tuple[int, ...]]] = []
        self._reduce, self._finish = getattr(optimizer, _REDUCE), getattr(optimizer, _EPILOGUE)
        setattr(optimizer, _REDUCE, self.reduce)
        setattr(optimizer, _EPILOGUE, self.finish)

    def reduce(self, parameter: nn.Parameter, *group: int) -> None:
        """Hand a complete gradient over now, or hold it back. group: its number under stages 1 and 2."""
        if id(parameter) in self._ids and self._is_due():
            self._waiting.append((parameter, group))
        else:
            self._reduce(parameter, *group)

    def finish(self) -> None:
        """Sum what was held back, hand it over, and let the optimizer finish."""
        held, self._waiting = self._waiting, []
        gradients = (self._gradient(parameter) for parameter, _ in held)
        _sum_together([gradient for gradient in gradients if gradient is not None], self._region)
        for parameter, group in held:
            self._reduce(parameter, *group)
        self._finish()

    def _is_due(self) -> bool:
        """Return whether the optimizer reduces gradients in this backward pass, and does not just add them up."""
        shards_gradients = getattr(self._optimizer, "partition_gradients", True)  # stage 3 always does
        return bool(shards_gradients or self._optimizer.is_gradient_accumulation_boundary())

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        read = getattr(self._optimizer, "get_gradient_for_reduction", None)  # stage 3 has none
        gradient: Tensor | None = parameter.grad if read is None else read(parameter)
        return gradient


@torch.no_grad()
def _sum_together(gradients: list[Tensor], region: TensorRegion) -> None:
    """Replace gradients by their sums over the tensor axis, which are fp32 until they are rounded."""
    if not gradients:
        return
    total = all_sum(torch.cat([gradient.reshape(-1).float() for gradient in gradients]), region)
    parts = total.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
