"""Transformer Engine's norms with the signatures of ours; imported only where it is installed and chosen.

Its functions (version 2), with unquantised outputs: `*_fwd(..., ln_out, quantizer, otype, sm_margin,
zero_centered_gamma)` on rows [r, h] returns output, mean and 1 / deviation; `*_bwd` returns the gradients.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformer_engine.pytorch  # noqa: F401 - loads what is imported next
import transformer_engine_torch as engine
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops import norms

_DTYPES: dict[torch.dtype, Any] = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
_PLAIN = (0, False)
"""sm_margin: no multiprocessor is left out; zero_centered_gamma: gains are themselves, not 1 plus themselves."""


def layer_norm(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`megatron.ops.norms.layer_norm`; without gain and offset over one dim, which this needs, PyTorch's."""
    if weight is None or bias is None or len(shape) > 1:
        return norms.layer_norm(inputs, shape, weight, bias, eps)
    output: Tensor = _LayerNorm.apply(inputs, weight, bias, eps)
    return output


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`megatron.ops.norms.rms_norm`; gains of several dims are PyTorch's."""
    if weight.dim() > 1:
        return norms.rms_norm(inputs, weight, eps)
    output: Tensor = _RMSNorm.apply(inputs, weight, eps)
    return output


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        output, mean, scale = engine.layernorm_fwd(rows, weight, bias, eps, None, None, _DTYPES[rows.dtype], *_PLAIN)
        ctx.save_for_backward(rows, mean, scale, weight)
        result: Tensor = output.view(inputs.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, scale, weight = ctx.saved_tensors
        gradient = upstream[0].reshape(rows.shape).contiguous()
        changes = engine.layernorm_bwd(gradient, rows, mean, scale, weight, *_PLAIN)
        return changes[0].view(upstream[0].shape), changes[1], changes[2], None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        output, _, scale = engine.rmsnorm_fwd(rows, weight, eps, None, None, _DTYPES[rows.dtype], *_PLAIN)
        ctx.save_for_backward(rows, scale, weight)
        result: Tensor = output.view(inputs.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, weight = ctx.saved_tensors
        gradient = upstream[0].reshape(rows.shape).contiguous()
        changes = engine.rmsnorm_bwd(gradient, rows, scale, weight, *_PLAIN)
        return changes[0].view(upstream[0].shape), changes[1], None
