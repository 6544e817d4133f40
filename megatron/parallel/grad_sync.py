"""Gradients that are partial on each tensor-parallel rank.

A replicated parameter that each rank uses for its own tokens (norms and positions under sequence parallelism) or its
own heads and features has a gradient for that use only; the whole one is the sum over the tensor axis. Which
parameters these are, their ShardSpec says. Each engine sums them together, as one flat tensor, before it reduces
gradients over the replicas.
"""

from __future__ import annotations

from torch import Tensor

from megatron.parallel.collectives import TensorRegion
from megatron.parallel.sharding import get_spec


def is_partial(parameter: Tensor, region: TensorRegion) -> bool:
    """Return whether each rank's gradient of the parameter is a part of the whole."""
    spec = get_spec(parameter)
    return region.is_split and (spec.tensor_partial or (spec.sequence_partial and region.sequence))
