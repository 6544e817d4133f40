"""Normalisation of the last dims, computed in fp32 whatever the input's dtype.

layer_norm  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          Ba et al. 2016
rms_norm    y = x / sqrt(mean(x^2) + eps) * weight                          Zhang & Sennrich 2019
scale_norm  y = weight * x / max(|x|_2, eps), with one scalar weight        Nguyen & Salazar 2019
add_*_norm  t = x + r, rounded to its dtype; y = the norm of t              returns y and t
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import norms_cpu


def layer_norm(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise over the last dims `shape`; weight and bias have that shape. PyTorch computes in fp32."""
    return F.layer_norm(inputs, shape, weight, bias, eps)


def layer_norm_reference(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The formula of `layer_norm`."""
    dims = tuple(range(-len(shape), 0))
    centred = inputs.float() - inputs.float().mean(dims, keepdim=True)
    output = centred / torch.sqrt(centred.square().mean(dims, keepdim=True) + eps)
    output = output if weight is None else output * weight.float()
    output = output if bias is None else output + bias.float()
    return output.to(inputs.dtype)


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dim; weight [..., h] broadcasts against the input."""
    if weight.dim() > 1:
        return rms_norm_reference(inputs, weight, eps)
    if norms_cpu.is_for(inputs, weight):
        return norms_cpu.rms_norm(inputs, weight, eps)
    return F.rms_norm(inputs, weight.shape, weight, eps)


def rms_norm_reference(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula of `rms_norm`."""
    values = inputs.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.float()).to(inputs.dtype)


def add_layer_norm(
    inputs: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return layer_norm over the last dim of inputs + residual, and that sum."""
    total = inputs + residual
    return layer_norm(total, total.shape[-1:], weight, bias, eps), total


def add_layer_norm_reference(
    inputs: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The formula of `add_layer_norm`."""
    total = inputs + residual
    return layer_norm_reference(total, total.shape[-1:], weight, bias, eps), total


def add_rms_norm(inputs: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rms_norm of inputs + residual, and that sum."""
    total = inputs + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_reference(inputs: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The formula of `add_rms_norm`."""
    total = inputs + residual
    return rms_norm_reference(total, weight, eps), total


def scale_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dim; weight [1]. The formula itself: one reduction and one product."""
    values = inputs.float()
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp(min=eps)
    return (values * (weight.float() / length)).to(inputs.dtype)
