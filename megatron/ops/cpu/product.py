"""Products of fp32 matrices with tiles that stay in registers: product.cpp says how.

On one core of an EPYC (Zen 4), whose limit is 117 GFLOP/s while its clock is at 3.7 GHz, products of weights that are
not in the cache reach 105 to 111.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.cpu.library import is_plain, kernel, make_ready

FEWEST_LINES = 96
"""Rows and columns of the least product: each factor is copied, which must pay for itself."""

FEWEST_RESULTS = 2**15
"""Numbers of the result for each thread, which copies what it needs of both factors for itself."""

_FILL, _ADD, _PASS = range(3)
_ALIGNMENT = 64


def serves(left: Tensor, right: Tensor) -> bool:
    """Return whether `multiply` computes left [n, k] @ right [k, m], each plain or a transposed view."""
    if not is_plain(left, right) or not left.dtype == right.dtype == torch.float32:
        return False
    if not left.dim() == right.dim() == 2 or left.shape[1] != len(right):
        return False
    rows, columns = len(left), right.shape[1]
    enough = (
        min(rows, columns) >= FEWEST_LINES
        and len(right) > 0
        and rows * columns >= FEWEST_RESULTS * torch.get_num_threads()
    )
    return enough and 1 in left.stride() and 1 in right.stride() and not make_ready(torch.device("cpu"))


def multiply(
    output: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    sums: Tensor | None = None,
    adds: bool = False,
    is_read: bool = True,
) -> Tensor:
    """Return `output` [n, m], which is filled with left [n, k] @ right [k, m] + bias [m], or to which that is added.

    output: fp32; its rows lie in one piece each. bias: of one piece; not where it `adds`.
    sums: [n] fp32, of one piece, which is filled with the sums of left's rows, which is a transposed view then.
    is_read: whether the result is needed soon. Else it goes to memory past the caches.
    """
    write = _ADD if adds else _FILL if is_read or not _is_aligned(output) else _PASS
    kernel("deepy_product", "pipiipiippiiiii")(
        output.data_ptr(), output.stride(0), left.data_ptr(), *_strides(left), right.data_ptr(), *_strides(right.t()),
        _address(bias), _address(sums), *output.shape, len(right), write, torch.get_num_threads(),
    )  # fmt: skip
    return output


def _strides(factor: Tensor) -> tuple[int, int]:
    """Return how far apart lines [n] of a factor [n, k], or their elements, lie, and whether lines are pieces (1)."""
    has_lines = factor.stride(1) == 1
    return (factor.stride(0) if has_lines else factor.stride(1)), int(has_lines)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_aligned(output: Tensor) -> bool:
    return output.data_ptr() % _ALIGNMENT == 0 and output.stride(0) * output.element_size() % _ALIGNMENT == 0
