"""Transformer Engine's linear layer with the signature of ours; imported only where it is installed and chosen.

Its module `Linear` (version 2.9 or later) under `autocast` with the recipe `Float8CurrentScaling`, whose formula is
that of `megatron.ops.fp8`: e4m3 and e5m2, and one scale for each tensor, from its largest value at the moment. The
weight stays ours: the module is made on the meta device, once for each shape, and is called with the weight of a layer
in the place of its own. It wants whole multiples of 16 rows; zeros that fill them up change no result.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as engine
from torch import Tensor, nn
from transformer_engine.common.recipe import Float8CurrentScaling

from megatron.ops.fp8 import MULTIPLE, fits
from megatron.ops.linear import linear

_RECIPE = Float8CurrentScaling()


def float8_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`megatron.ops.fp8.float8_linear`."""
    if not fits(weight):
        return linear(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])
    filled = F.pad(rows, (0, 0, 0, -len(rows) % MULTIPLE))
    module = _layer(*weight.shape, weight.dtype)
    with engine.autocast(enabled=True, recipe=_RECIPE):
        result: Tensor = torch.func.functional_call(module, {"weight": weight}, (filled,))
    output = result[: len(rows)].view(*inputs.shape[:-1], len(weight))
    return output if bias is None else output + bias


@cache
def _layer(out_features: int, in_features: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer without a bias and without memory of its own."""
    layer: nn.Module = engine.Linear(in_features, out_features, bias=False, params_dtype=dtype, device="meta")
    return layer
