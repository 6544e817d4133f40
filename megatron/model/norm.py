"""Norm modules by the names of the `norm` key; the formulae are in megatron/ops/norms.py.

norm(inputs) is the norm; norm(inputs, residual) is the norm of their sum, and that sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config.schema.model import ModelConfig
from megatron.ops import norms
from megatron.ops.choice import Choices, Function
from megatron.ops.norms import layer_norm, scale_norm
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import make_parameter, ones, zeros
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec

_REPLICATED = Axis("replicated")

OUTSIDE = ShardSpec(sequence_partial=True)
"""Of a norm outside of the split layers: under sequence parallelism each rank uses it for tokens of its own."""

INSIDE = ShardSpec(tensor_partial=True)
"""Of a norm between `enter` and `leave`: each rank's gradient comes from its own heads and features."""


NO_CHOICES = Choices()
"""PyTorch's own computes everything."""

Normed = Tensor | tuple[Tensor, Tensor]


class LayerNorm(nn.Module):
    """layer_norm over the last dim, of size `width`. affine: with a gain; bias: with an offset beside the gain."""

    def __init__(
        self,
        width: int,
        eps: float,
        affine: bool,
        bias: bool,
        spec: ShardSpec = OUTSIDE,
        choices: Choices = NO_CHOICES,
    ) -> None:
        super().__init__()
        self.is_composite = False
        self.norm: Function = choices.get("layer_norm", norms.layer_norm)
        self.add_norm: Function = choices.get("add_layer_norm", norms.add_layer_norm)
        shape = (width,)
        self.shape = shape
        self.eps = eps
        self.weight = make_parameter(shape, spec, _REPLICATED, ones) if affine else None
        self.bias = make_parameter(shape, spec, _REPLICATED, zeros) if affine and bias else None

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is not None:
            result: tuple[Tensor, Tensor] = self.add_norm(inputs, residual, self.weight, self.bias, self.eps)
            return result
        output: Tensor = self.norm(inputs, self.shape, self.weight, self.bias, self.eps)
        return output


class HeadLayerNorm(nn.Module):
    """layer_norm over all heads together, [n, d], of which this rank has its own, with their gains: [..., n/tp, d]."""

    def __init__(self, shape: tuple[int, int], eps: float, affine: bool, bias: bool, region: TensorRegion) -> None:
        super().__init__()
        self.eps = eps
        self.region = region
        self.count = shape[0] * shape[1]
        self.weight = make_parameter(shape, ShardSpec(dim=0), region.axis, ones) if affine else None
        self.bias = make_parameter(shape, ShardSpec(dim=0), region.axis, zeros) if affine and bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.region.is_split:
            return layer_norm(inputs, tuple(inputs.shape[-2:]), self.weight, self.bias, self.eps)
        centred = inputs.float() - self._mean(inputs.float())
        output = centred * torch.rsqrt(self._mean(centred.square()) + self.eps)
        output = output if self.weight is None else output * self.weight.float()
        output = output if self.bias is None else output + self.bias.float()
        return output.to(inputs.dtype)

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean [..., 1, 1] over the heads of all ranks."""
        return self.region.sum_for_all(values.sum((-2, -1), keepdim=True)) / self.count


class RMSNorm(nn.Module):
    """rms_norm over the last dim, with gains of `shape`, split over `axis` as `spec` says."""

    def __init__(
        self,
        shape: tuple[int, ...],
        eps: float,
        spec: ShardSpec = OUTSIDE,
        axis: Axis = _REPLICATED,
        choices: Choices = NO_CHOICES,
    ) -> None:
        super().__init__()
        self.is_composite = choices.fused("rms_norm") is None
        """Whether it is several operations, which keep more than its input."""
        self.norm: Function = choices.get("rms_norm", norms.rms_norm)
        self.add_norm: Function = choices.get("add_rms_norm", norms.add_rms_norm)
        self.eps = eps
        self.weight = make_parameter(shape, spec, axis, ones)

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is not None:
            result: tuple[Tensor, Tensor] = self.add_norm(inputs, residual, self.weight, self.eps)
            return result
        output: Tensor = self.norm(inputs, self.weight, self.eps)
        return output


class ScaleNorm(nn.Module):
    """scale_norm over the last dim, with one scalar gain."""

    def __init__(self, eps: float, spec: ShardSpec = OUTSIDE) -> None:
        super().__init__()
        self.is_composite = True
        self.eps = eps
        self.weight = make_parameter((1,), spec, _REPLICATED, ones)

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is None:
            return scale_norm(inputs, self.weight, self.eps)
        total = inputs + residual
        return scale_norm(total, self.weight, self.eps), total


def make_norm(model: ModelConfig, spec: ShardSpec = OUTSIDE, choices: Choices = NO_CHOICES) -> nn.Module:
    """Return the norm of hidden states that the config asks for. Norms do not decay."""
    width, eps = model.hidden_size, model.layernorm_epsilon
    makers: dict[str, Callable[[], nn.Module]] = {
        "layernorm": lambda: LayerNorm(width, eps, True, model.use_bias_in_norms, spec, choices),
        "non_parametric_layernorm": lambda: LayerNorm(width, eps, False, False, spec, choices),
        "rmsnorm": lambda: RMSNorm((width,), model.rms_norm_epsilon, spec, choices=choices),
        "scalenorm": lambda: ScaleNorm(model.scalenorm_epsilon, spec),
    }
    return _without_decay(makers[model.norm]())


def make_head_norm(model: ModelConfig, region: TensorRegion) -> nn.Module:
    """Return the norm of queries and keys [..., n/tp, d] that the config asks for; gains are of each query head.

    layernorm takes its statistics over all heads together, as GPT-NeoX does, the others head by head.
    """
    heads = model.num_attention_heads
    shape = (heads, model.hidden_size // heads)
    makers: dict[str, Callable[[], nn.Module]] = {
        "layernorm": lambda: HeadLayerNorm(shape, model.layernorm_epsilon, True, model.use_bias_in_norms, region),
        "non_parametric_layernorm": lambda: HeadLayerNorm(shape, model.layernorm_epsilon, False, False, region),
        "rmsnorm": lambda: RMSNorm(shape, model.rms_norm_epsilon, ShardSpec(dim=0), region.axis),
        "scalenorm": lambda: ScaleNorm(model.scalenorm_epsilon, INSIDE),
    }
    return _without_decay(makers[model.norm]())


def _without_decay(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return norm
