"""The linear map y = x W^T + b and plain matrix products, by whichever library is faster on this processor.

    dx = dy W      dW = dy^T x      db = sum of the rows of dy

PyTorch hands fp32 products on a CPU to MKL, which holds back on processors of another maker: on one core of an EPYC
(Zen 4), whose limit is 117 GFLOP/s, shapes of GPT-NeoX at hidden 512 to 1024 run at 83 to 100. There our own kernel
(`ops/cpu/product.py`), where a compiler could build it, reaches 105 to 113; it adds the bias, sums it for db, and
writes where it is told to. oneDNN reaches 100 to 107 in y and dx, and has what is too small to be copied; of dW it has
those where x has 768 features or more. Small products are MKL's. In bf16, which PyTorch hands to oneDNN, the kernel is
faster as well: docs/cpu_kernels.md has the figures.

Which library computes is a function of processor, dtype, shape and threads, never of a timing: a resumed run repeats
bit by bit, and so does every rank.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.cpu.library import has_bf16, is_plain, make_ready
from megatron.ops.cpu.product import multiply, serves
from megatron.ops.lent_linear import is_lent, lent_linear

SMALLEST = 2**24
"""Multiplications of the least product that is worth oneDNN's longer start."""

NARROWEST = 768
"""Columns of the narrowest product with a transposed left factor that oneDNN computes faster."""

BLOCK_BYTES = 16 * 2**20
"""Bytes that a product into given memory computes at once: blocks that the allocator keeps at hand cost no page
faults, which a fresh 100 MB costs 25,000 of."""


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b [..., out] from x [..., in], W [out, in] and b [out]."""
    if _is_large(inputs, weight, bias):
        result: Tensor = _Linear.apply(inputs, weight, bias)
        return result
    is_eager = not torch.compiler.is_compiling()  # compiled code keeps parameters themselves
    plain = lent_linear if is_eager and is_lent(weight) else linear_reference
    return plain(inputs, weight, bias)


def linear_reference(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by PyTorch alone."""
    return F.linear(inputs, weight, bias)


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left @ right + bias [n, m] from left [n, k], right [k, m] and bias [m]; factors may be transposed views.

    It has no gradient of its own: it serves the functions that write theirs out.
    """
    if _is_ours(left, right):
        output = left.new_empty(left.shape[0], right.shape[1])
        return multiply(output, left, right, bias, is_read=not _is_turned(left))
    if _is_faster_by_onednn(left, right):
        return _by_onednn(left, right.t(), bias)
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


def accumulate_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> Tensor:
    """Return `total` [n, m], to which `product(left, right)` was added, or which was filled with it.

    total: of the factors' dtype, or fp32 where it `accumulates`.
    """
    if accumulates(total, left, right, is_first):
        return multiply(total, left, right, adds=not is_first, is_read=not _is_turned(left))
    return torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)


def accumulates(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> bool:
    """Return whether our own kernel adds left @ right, unrounded, to `total`, or fills it with that."""
    is_addable = total.dtype == torch.float32 or (is_first and total.dtype == left.dtype)
    return is_addable and total.stride(1) == 1 and _is_ours(left, right)


def product_into(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `output` [n, m], filled with `product(left, right)`."""
    if output.stride(1) == 1 and _is_ours(left, right):
        return multiply(output, left, right)
    if not _is_faster_by_onednn(left, right):
        return torch.mm(left, right, out=output)
    width = max(1, BLOCK_BYTES // (output.element_size() * len(left)))
    for start in range(0, right.shape[1], width):
        output[:, start : start + width] = _by_onednn(left, right[:, start : start + width].t())
    return output


class _Linear(torch.autograd.Function):
    """The formulae at the top."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        *batch, features = inputs.shape
        rows = inputs.reshape(-1, features)
        return product(rows, weight.t(), None if bias is None else bias.contiguous()).view(*batch, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        to_inputs = product(gradient, weight).view(inputs.shape) if needs_input else None
        if not needs_weight:
            return to_inputs, None, gradient.sum(0) if needs_bias else None
        return to_inputs, *_parameter_gradients(gradient, inputs.reshape(-1, inputs.shape[-1]), needs_bias)


def _parameter_gradients(gradient: Tensor, inputs: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return dW [out, in] and db [out] from dy [t, out] and x [t, in]."""
    turned = gradient.t()
    if not (needs_bias and _is_ours(turned, inputs)):
        return product(turned, inputs), gradient.sum(0) if needs_bias else None
    weight, sums = inputs.new_empty(len(turned), inputs.shape[1]), inputs.new_empty(len(turned), dtype=torch.float32)
    return multiply(weight, turned, inputs, sums=sums, is_read=False), sums.to(inputs.dtype)


def _by_onednn(left: Tensor, transposed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left @ transposed^T + bias in memory of its own."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, transposed, bias, "none", [], "")
    return result


def _is_large(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether this is a map of tensors on a CPU whose products are worth a choice: PyTorch knows or refuses all
    others, among them tensors that are more than memory and those that do not fit."""
    biases = () if bias is None else (bias,)
    return (
        is_plain(inputs, weight, *biases)
        and inputs.dtype == weight.dtype
        and weight.dim() == 2
        and inputs.numel() * weight.shape[0] >= SMALLEST
        and inputs.shape[-1:] == weight.shape[1:]
        and all(each.dtype == weight.dtype and each.shape == weight.shape[:1] for each in biases)
        and _has_choice(weight)
        and not torch.is_autocast_enabled(weight.device.type)
    )


def _has_choice(weight: Tensor) -> bool:
    """Return whether PyTorch's own products of this dtype are not the fastest on this processor."""
    if weight.dtype == torch.bfloat16:
        return onednn_wins() and not make_ready(weight.device) and has_bf16()
    return weight.dtype == torch.float32 and onednn_wins()


def _is_ours(left: Tensor, right: Tensor) -> bool:
    """Return whether our own kernel computes left [n, k] @ right [k, m], and does so faster than others."""
    return left.numel() * right.shape[1] >= SMALLEST and onednn_wins() and serves(left, right)


def _is_turned(left: Tensor) -> bool:
    """Return whether the left factor is a transposed view: the product is a weight's gradient, needed later."""
    return left.stride(0) == 1 and left.shape[1] > 1


def _is_faster_by_onednn(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN computes left [n, k] @ right [k, m] faster than PyTorch's own choice."""
    columns = right.shape[1]
    if not left.dtype == right.dtype == torch.float32 or left.numel() * columns < SMALLEST:
        return False
    is_narrow = _is_turned(left) and columns < NARROWEST
    return not is_narrow and bool(torch.backends.mkldnn.enabled) and onednn_wins() and is_plain(left, right)


@functools.cache
def onednn_wins() -> bool:
    """Return whether this processor is of the kind on which MKL's fp32 products were measured to be slower."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _maker() == "AuthenticAMD"
    )


def _maker() -> str:
    """Return the processor's vendor_id, or "" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
