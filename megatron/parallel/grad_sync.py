"""Gradients that are partial on each tensor-parallel rank, and where they become whole.

A replicated parameter that each rank uses for its own tokens (norms and positions under sequence parallelism) or its
own heads and features has a gradient for that use only; the whole one is the sum over the tensor axis. Which
parameters these are, their ShardSpec says. An engine that owns its gradients sums them once a step, as one range of
its buffer; for DeepSpeed, whose hooks take each gradient away as soon as it is complete, `sum_in_backward` does it
just before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import TensorRegion, all_sum
from megatron.parallel.sharding import get_spec


def is_partial(parameter: Tensor, region: TensorRegion) -> bool:
    """Return whether each rank's gradient of the parameter is a part of the whole."""
    spec = get_spec(parameter)
    return region.is_split and (spec.tensor_partial or (spec.sequence_partial and region.sequence))


def sum_in_backward(parameters: Iterable[nn.Parameter], region: TensorRegion) -> None:
    """Make every backward pass sum partial gradients over the tensor axis before anybody sees them.

    The order of collectives is that of the backward pass, which is the same on all ranks. 16 bit gradients are summed
    in fp32. Call it once, on the parameters in their final dtype.
    """
    wide = TensorRegion(region.axis, region.sequence, fp32=True)
    for parameter in parameters:
        if parameter.requires_grad and is_partial(parameter, region):
            parameter.register_hook(_summed(wide))


def _summed(region: TensorRegion) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        with torch.no_grad():
            return all_sum(gradient, region)

    return hook
