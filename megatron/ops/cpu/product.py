"""The gradient of a weight in fp32, dW = dy^T x, with tiles that stay in registers: product.cpp says how.

On one core of an EPYC (Zen 4), whose limit is about 108 GFLOP/s, it reaches 98 to 107, in the same runs in which MKL
reaches 87 to 100 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.cpu.library import is_plain, kernel, make_ready

_FEWEST_ROWS = 96
"""Rows of the result for each thread, of which each copies the right factor for itself."""


def serves(left: Tensor, right: Tensor) -> bool:
    """Return whether `add_product` computes left @ right, from left [n, k], a transposed view, and right [k, m]."""
    if not is_plain(left, right) or not left.dtype == right.dtype == torch.float32:
        return False
    fits = left.stride(0) == 1 and right.stride(1) == 1 and left.stride(1) >= len(left)
    enough = len(left) >= _FEWEST_ROWS * torch.get_num_threads()
    return fits and enough and right.stride(0) >= right.shape[1] and not make_ready(torch.device("cpu"))


def add_product(output: Tensor, left: Tensor, right: Tensor, is_first: bool) -> Tensor:
    """Return `output` [n, m], to which left @ right was added, or, the first time, which was filled with it."""
    kernel("deepy_transposed_product", "pipipiiiii")(
        output.data_ptr(), output.stride(0), left.data_ptr(), left.stride(1), right.data_ptr(), right.stride(0),
        *output.shape, len(right), not is_first,
    )  # fmt: skip
    return output
