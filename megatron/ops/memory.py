"""Large buffers on a CPU that serve every step, instead of going back to the system and coming again.

Memory beyond 32 MB, glibc's limit, comes from the kernel at each allocation, and the kernel clears each of its pages
when it is first touched: 2 microseconds for 4 KB, 60 ms for the gradient of a table of 50304 x 512 in fp32. On a GPU
PyTorch's allocator keeps memory by itself, and compiled code plans its own.

A buffer belongs to the parameter that it serves, and goes with it. Whoever takes one is its only owner until they keep
it for the next: two uses at a time get two buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_KEPT = "kept_buffers"
_GRADIENT = "gradient"


def take(parameter: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory on the parameter's device: what was kept under this name if it fits, else new."""
    if torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    kept: Tensor | None = parameter.__dict__.setdefault(_KEPT, {}).pop(name, None)
    if kept is None or kept.dtype != dtype or kept.shape != torch.Size(shape):
        with torch.inference_mode(False):  # what is made while evaluating must serve training too
            return torch.empty(shape, dtype=dtype, device=parameter.device)
    return kept


def keep(parameter: Tensor, name: str, buffer: Tensor) -> None:
    """Hand back what was taken; only a CPU's is kept."""
    if _is_worth_keeping(buffer) and not torch.compiler.is_compiling():
        parameter.__dict__.setdefault(_KEPT, {})[name] = buffer


def _is_worth_keeping(buffer: Tensor) -> bool:
    return buffer.device.type == "cpu"


def take_gradient(parameter: Tensor) -> Tensor:
    """Return uninitialised memory for a gradient of the parameter's shape and dtype."""
    return take(parameter, _GRADIENT, parameter.shape, parameter.dtype)


def release_gradient(parameter: Tensor) -> None:
    """Set the parameter's gradient to None, and keep its memory where `take_gradient` will ask for it."""
    if parameter.grad is not None and _KEPT in parameter.__dict__:
        keep(parameter, _GRADIENT, parameter.grad)
    parameter.grad = None


def accumulate(total: Tensor, part: Tensor, is_first: bool) -> None:
    """Set `total` to `part`, or add it: of one shape, of any dtypes, without a copy of `part` in that of `total`."""
    if is_first:
        total.copy_(part)
    elif total.dtype == part.dtype or total.device.type != "cpu":
        total.add_(part)
    else:  # PyTorch would convert all of it first
        for block, added in zip(total.view(-1).split(_BLOCK), part.reshape(-1).split(_BLOCK), strict=True):
            block.add_(added)


_BLOCK = 2**18
"""Elements that are converted at once, which stay in the cache."""
