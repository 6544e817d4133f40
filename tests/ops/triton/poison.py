"""New memory that is full of NaN and stands between guards, so that what a kernel leaves out or overwrites is seen.

with poisoned():
    output = kernel(inputs)     # every torch.empty inside is NaN; an element written beyond it fails the test
assert_close(output, expected)  # an element never written is still NaN
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

_GUARD = 64
_INTEGER = -77


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block torch.empty, torch.empty_like and Tensor.new_empty give such memory; at its end guards count."""
    allocated: list[tuple[Tensor, int]] = []
    empty = torch.empty

    def poisoned_empty(
        *size: int | tuple[int, ...], dtype: torch.dtype | None = None, device=None, **options
    ) -> Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        buffer = empty(shape.numel() + 2 * _GUARD, dtype=dtype, device=device)
        buffer.fill_(float("nan") if buffer.is_floating_point() else _INTEGER)
        allocated.append((buffer, shape.numel()))
        return buffer[_GUARD : _GUARD + shape.numel()].view(shape)

    def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None, device=None, **options) -> Tensor:
        assert tensor.is_contiguous(), "a copy of strides is not poisoned"
        return poisoned_empty(tensor.shape, dtype=dtype or tensor.dtype, device=device or tensor.device)

    def new_empty(tensor: Tensor, *size: int, dtype: torch.dtype | None = None, device=None, **options) -> Tensor:
        return poisoned_empty(*size, dtype=dtype or tensor.dtype, device=device or tensor.device)

    with (
        patch.object(torch, "empty", poisoned_empty),
        patch.object(torch, "empty_like", empty_like),
        patch.object(Tensor, "new_empty", new_empty, create=True),
    ):
        yield
    assert allocated, "nothing was allocated within poisoned()"
    for buffer, count in allocated:
        for guard in (buffer[:_GUARD], buffer[_GUARD + count :]):
            intact = guard.isnan() if guard.is_floating_point() else guard == _INTEGER
            assert intact.all(), f"a kernel wrote beyond a tensor of {count} elements"
