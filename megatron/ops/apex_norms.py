"""apex's fused norms with the signatures of ours; imported only where apex is installed and chosen."""

from __future__ import annotations

from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine
from torch import Tensor

from megatron.ops import norms


def layer_norm(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`megatron.ops.norms.layer_norm`; without gain and offset, which apex's needs, PyTorch's."""
    if weight is None or bias is None:
        return norms.layer_norm(inputs, shape, weight, bias, eps)
    output: Tensor = fused_layer_norm_affine(inputs, weight, bias, shape, eps)
    return output


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`megatron.ops.norms.rms_norm`; gains of several dims are PyTorch's."""
    if weight.dim() > 1:
        return norms.rms_norm(inputs, weight, eps)
    output: Tensor = fused_rms_norm_affine(inputs, weight, weight.shape, eps)
    return output
