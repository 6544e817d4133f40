"""What every rank must have found alike, such as the kernels that it can run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron.parallel.mesh import Axis


def gathered(value: Any, axis: Axis) -> list[Any]:
    """Return each rank's value, in the axis's order; all its ranks call this. A value is anything that pickles."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values
