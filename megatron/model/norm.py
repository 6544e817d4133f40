"""Norm modules by the names of the `norm` key; the formulae are in megatron/ops/norms.py."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron.config.schema.model import ModelConfig
from megatron.ops.norms import layer_norm, rms_norm, scale_norm
from megatron.parallel.layers import make_parameter, ones, zeros
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec

_REPLICATED = Axis("replicated")
_SPEC = ShardSpec(sequence_partial=True)


class LayerNorm(nn.Module):
    """layer_norm over the last dims `shape`. affine: with a gain; bias: with an offset beside the gain."""

    def __init__(self, shape: tuple[int, ...], eps: float, affine: bool, bias: bool) -> None:
        super().__init__()
        self.shape = shape
        self.eps = eps
        self.weight = make_parameter(shape, _SPEC, _REPLICATED, ones) if affine else None
        self.bias = make_parameter(shape, _SPEC, _REPLICATED, zeros) if affine and bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        return layer_norm(inputs, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """rms_norm over the last dim, with gains of `shape`."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(shape, _SPEC, _REPLICATED, ones)

    def forward(self, inputs: Tensor) -> Tensor:
        return rms_norm(inputs, self.weight, self.eps)


class ScaleNorm(nn.Module):
    """scale_norm over the last dim, with one scalar gain."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter((1,), _SPEC, _REPLICATED, ones)

    def forward(self, inputs: Tensor) -> Tensor:
        return scale_norm(inputs, self.weight, self.eps)


def make_norm(model: ModelConfig, shape: tuple[int, ...]) -> nn.Module:
    """Return the norm that the config asks for, with gains of `shape`.

    layernorm takes its statistics over all dims of `shape`, the others over the last one. Norms do not decay.
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "layernorm": lambda: LayerNorm(shape, model.layernorm_epsilon, affine=True, bias=model.use_bias_in_norms),
        "non_parametric_layernorm": lambda: LayerNorm(shape, model.layernorm_epsilon, affine=False, bias=False),
        "rmsnorm": lambda: RMSNorm(shape, model.rms_norm_epsilon),
        "scalenorm": lambda: ScaleNorm(model.scalenorm_epsilon),
    }
    norm = makers[model.norm]()
    for parameter in norm.parameters():
        parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return norm
