"""Gradients of ZeRO 3 without copies: what `straight.py` says of it.

In a world of one the share of a weight is all of it, so its gradient goes to the update as the backward pass made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.engine.one_update import OneUpdate
from megatron.ops.accumulate import accumulate
from megatron.ops.choice import Function

_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""Where a ZeRO 3 optimizer finds the gradient of each weight, by its `ds_id`."""


class _WholeGradients:
    """The gradients of a ZeRO 3 optimizer in a world of one, taken as the backward pass makes them.

    squares: the operation `sum_of_squares`.
    """

    def __init__(self, optimizer: Any, squares: Function) -> None:
        self._optimizer = optimizer
        self._weights: list[Any] = [weight for group in optimizer.fp16_groups for weight in group]
        self._written: set[int] = set()
        self._finish, self._begin_step = optimizer.independent_gradient_partition_epilogue, optimizer._pre_step
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = self.take
        optimizer.independent_gradient_partition_epilogue = self.finish
        optimizer.get_grad_norm_direct = norm_by(squares)
        optimizer._pre_step = self.begin_step
        optimizer._prepare_fp32_grad_for_sub_group = self.hand_over
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None  # no bucket is filled

    @torch.no_grad()
    def take(self, weight: Any) -> None:
        """Add a weight's gradient to its sum, and free it; after each gradient, in the place of what fills buckets."""
        if weight.grad is not None:
            self._add(weight, weight.grad.reshape(-1), is_first=weight.ds_id not in self._written)
            self._written.add(weight.ds_id)
            weight.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """End a backward pass. What had no gradient in it has 0, where DeepSpeed would leave that of the last step."""
        for weight in self._weights:
            if weight.ds_id not in self._written:
                self._clear(weight)
        self._written.update(weight.ds_id for weight in self._weights)
        self._finish()

    def begin_step(self) -> None:
        """Let the next gradients begin new sums; at the beginning of the optimizer's step."""
        self._written.clear()
        self._begin_step()

    def hand_over(self, group: int) -> None:
        """Give the gradients of one group to its update."""
        raise NotImplementedError

    def _add(self, weight: Any, part: Tensor, is_first: bool) -> None:
        raise NotImplementedError

    def _clear(self, weight: Any) -> None:
        raise NotImplementedError


class FlatGradients(_WholeGradients):
    """Sums in the optimizer's flat gradients, which stay; the update reads them where they are."""

    def __init__(self, optimizer: Any, squares: Function) -> None:
        super().__init__(optimizer, squares)
        groups: list[list[Any]] = optimizer.fp16_groups
        sizes = [sum(weight.partition_numel() for weight in group) for group in groups]
        self._groups = optimizer.grad_partitions_flat_buffer.split(sizes)
        self._sums: dict[int, Tensor] = {}
        for group, flat in zip(groups, self._groups, strict=True):
            parts = flat.split([weight.partition_numel() for weight in group])
            self._sums |= {weight.ds_id: part for weight, part in zip(group, parts, strict=True)}

    def hand_over(self, group: int) -> None:
        """Give the sums of one group to its masters, which `unscale_and_clip_grads` scales where they are."""
        master = self._optimizer.fp32_partitioned_groups_flat[group]
        master.grad = self._groups[group].to(master.dtype)
        self._optimizer.averaged_gradients[group] = None

    def _add(self, weight: Any, part: Tensor, is_first: bool) -> None:
        accumulate(self._sums[weight.ds_id], part, is_first)

    def _clear(self, weight: Any) -> None:
        self._sums[weight.ds_id].zero_()


class OwnGradients(_WholeGradients):
    """Autograd's own gradients, of one micro-batch, which the update reads where they are, and lets go of.

    They stand where the optimizer has views of its flat gradients, which take no memory then.
    """

    def __init__(self, optimizer: Any, update: OneUpdate) -> None:
        super().__init__(optimizer, update.squares)
        self._update = update
        self._gradients: dict[int, Tensor] = getattr(optimizer, _GRADIENTS)
        self._nothing = optimizer.grad_partitions_flat_buffer.new_empty(0)
        optimizer.grad_partitions_flat_buffer = self._nothing
        self._let_go(self._weights)

    def hand_over(self, group: int) -> None:
        """Give the gradients of one group to what updates its master."""
        master = self._optimizer.fp32_partitioned_groups_flat[group]
        self._update.parts[id(master)] = self._optimizer.averaged_gradients[group]
        self._optimizer.averaged_gradients[group] = None
        self._let_go(self._optimizer.fp16_groups[group])

    def _add(self, weight: Any, part: Tensor, is_first: bool) -> None:
        self._gradients[weight.ds_id] = part if is_first else self._gradients[weight.ds_id].add_(part)

    def _clear(self, weight: Any) -> None:
        self._gradients[weight.ds_id] = torch.zeros_like(weight.ds_tensor)

    def _let_go(self, weights: Iterable[Any]) -> None:
        self._gradients.update({weight.ds_id: self._nothing for weight in weights})


class Zeros:
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


def norm_by(squares: Function) -> Callable[..., Tensor]:
    """Return what computes the L2 norm of one group's gradients, fp32; -1 where it is not finite, as DeepSpeed has it.

    squares: the operation `sum_of_squares`."""

    def norm(gradients: list[Tensor], parameters: Any, norm_type: int = 2) -> Tensor:
        found = squares(list(gradients)).sqrt().float()
        return torch.where(torch.isfinite(found), found, -torch.ones_like(found))

    return norm
