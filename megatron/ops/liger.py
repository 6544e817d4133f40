"""Liger-Kernel's operations with the signatures of ours; imported only where it is installed and chosen.

Not offered: its GeGLU, which is the tanh form, and its cross entropy, which rounds each loss to the logits' dtype.
"""

from __future__ import annotations

from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor

from megatron.ops import activations, norms

_IN_FP32 = "gemma"
"""The casting mode in which nothing is rounded before the result, as in our formula."""


def layer_norm(
    inputs: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`megatron.ops.norms.layer_norm`; without gain and offset over one dim, which Liger needs, PyTorch's."""
    if weight is None or bias is None or len(shape) > 1:
        return norms.layer_norm(inputs, shape, weight, bias, eps)
    output: Tensor = LigerLayerNormFunction.apply(inputs, weight, bias, eps)
    return output


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`megatron.ops.norms.rms_norm`; gains of several dims, which Liger has not, are PyTorch's."""
    if weight.dim() > 1:
        return norms.rms_norm(inputs, weight, eps)
    output: Tensor = LigerRMSNormFunction.apply(inputs, weight, eps, 0.0, _IN_FP32, False)
    return output


def add_rms_norm(inputs: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`megatron.ops.norms.add_rms_norm`."""
    result: tuple[Tensor, Tensor] = LigerFusedAddRMSNormFunction.apply(
        inputs, residual, weight, eps, 0.0, _IN_FP32, False
    )
    return result


def bias_swiglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`megatron.ops.activations.bias_swiglu`, after the bias is added by itself.

    Liger's gradients take the memory of its inputs, which are copies of the halves unless there is a single row.
    """
    if inputs.shape[:-1].numel() == 1:
        return activations.bias_swiglu(inputs, bias)
    value, gate = (inputs if bias is None else inputs + bias).chunk(2, dim=-1)
    output: Tensor = LigerSiLUMulFunction.apply(gate, value)
    return output
