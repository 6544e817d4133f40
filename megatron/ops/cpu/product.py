"""Products of fp32 or bf16 matrices with tiles that stay in registers: product.cpp says how.

On one core of an EPYC (Zen 4), whose limit is 117 GFLOP/s while its clock is at 3.7 GHz, fp32 products of weights that
are not in the cache reach 105 to 113. bf16 needs AVX-512's products of pairs, whose limit is twice that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.cpu.library import DTYPES, has_bf16, is_plain, kernel, make_ready

FEWEST_LINES = 96
"""Rows and columns of the least product: each factor is copied, which must pay for itself."""

FEWEST_RESULTS = 2**15
"""Numbers of the result for each thread, which copies what it needs of both factors for itself."""

_FILL, _ADD, _PASS = range(3)
_ALIGNMENT = 64
_CPU = torch.device("cpu")


def serves(left: Tensor, right: Tensor) -> bool:
    """Return whether `multiply` computes left [n, k] @ right [k, m], each plain or a transposed view."""
    if left.dtype != right.dtype or not left.dim() == right.dim() == 2:
        return False
    (rows, depth), (deep, columns) = left.shape, right.shape
    if not 0 < depth == deep or min(rows, columns) < FEWEST_LINES:
        return False
    is_enough = rows * columns >= FEWEST_RESULTS * torch.get_num_threads()
    if not is_enough or not is_plain(left, right) or make_ready(_CPU):
        return False
    is_known = left.dtype == torch.float32 or (left.dtype == torch.bfloat16 and has_bf16())
    return is_known and 1 in left.stride() and 1 in right.stride()


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

    left, right: both fp32, or both bf16. output: of their dtype or fp32; its rows lie in one piece each. bias: of its
    dtype, of one piece. adds: to fp32 only. sums: [n] fp32, of one piece, which is filled with the sums of left's rows,
    which is a transposed view then. is_read: whether the result is needed soon. Else it goes to memory past the caches.
    """
    assert output.dtype in (left.dtype, torch.float32)
    assert not adds or output.dtype == torch.float32
    assert bias is None or bias.dtype == output.dtype
    write = _ADD if adds else _FILL if is_read or not _is_aligned(output) else _PASS
    (rows, columns), (down, across), (down_right, across_right) = output.shape, left.stride(), right.stride()
    has_lines, has_lines_right = across == 1, down_right == 1
    kernel("deepy_product", "iipipiipiippiiiii")(
        DTYPES[left.dtype], DTYPES[output.dtype], output.data_ptr(), output.stride(0),
        left.data_ptr(), down if has_lines else across, has_lines,
        right.data_ptr(), across_right if has_lines_right else down_right, has_lines_right, _address(bias),
        _address(sums), rows, columns, right.shape[0], write, torch.get_num_threads(),
    )  # fmt: skip
    return output


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_aligned(output: Tensor) -> bool:
    return output.data_ptr() % _ALIGNMENT == 0 and output.stride(0) * output.element_size() % _ALIGNMENT == 0
