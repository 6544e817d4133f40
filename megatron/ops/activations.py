"""Activations by the names of the `activation` key, plain and gated.

gelu       x Phi(x)                                              Hendrycks & Gimpel 2016
gelu_tanh  x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
silu       x sigmoid(x), also called swish
mish       x tanh(softplus(x))
softsign   x / (1 + |x|)
gated      act(gate) * value, where [value; gate] are the halves of the last dim: geglu, swiglu, reglu (Shazeer
           2020), glu with the sigmoid, bilinear with the identity
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
BiasActivation = Callable[[Tensor, Tensor | None], Tensor]
"""(inputs [..., f], bias [f] or None) -> the activation of their sum."""


def gelu(inputs: Tensor) -> Tensor:
    """The exact form, with the error function."""
    return F.gelu(inputs)


def gelu_tanh(inputs: Tensor) -> Tensor:
    """The tanh approximation."""
    return F.gelu(inputs, approximate="tanh")


def identity(inputs: Tensor) -> Tensor:
    """The gate of `bilinear`."""
    return inputs


PLAIN: dict[str, Activation] = {
    "gelu": gelu,
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": F.silu,
    "silu": F.silu,
    "mish": F.mish,
}
GATES: dict[str, Activation] = {
    "geglu": gelu,
    "swiglu": F.silu,
    "reglu": F.relu,
    "glu": torch.sigmoid,
    "bilinear": identity,
}


def gated(inputs: Tensor, gate: Activation) -> Tensor:
    """Return gate(second half) * first half over the last dim: [..., 2 f] -> [..., f]."""
    value, gates = inputs.chunk(2, dim=-1)
    return gate(gates) * value


def _biased(inputs: Tensor, bias: Tensor | None) -> Tensor:
    return inputs if bias is None else inputs + bias


def bias_gelu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return gelu(inputs + bias) for inputs [..., f] and bias [f]."""
    return gelu(_biased(inputs, bias))


def bias_gelu_tanh(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return gelu_tanh(inputs + bias) for inputs [..., f] and bias [f]."""
    return gelu_tanh(_biased(inputs, bias))


def bias_swiglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(gate) * value [..., f] for [value; gate] = inputs + bias, [..., 2 f]."""
    return gated(_biased(inputs, bias), F.silu)


def bias_geglu(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return gelu(gate) * value [..., f] for [value; gate] = inputs + bias, [..., 2 f]."""
    return gated(_biased(inputs, bias), gelu)


def make_activation(name: str, tanh_gelu: bool = False) -> Activation:
    """Return the function of an `activation` name; gated ones halve the last dim.

    tanh_gelu: the tanh form for "gelu".
    """
    if name in PLAIN:
        return gelu_tanh if tanh_gelu and name == "gelu" else PLAIN[name]
    return partial(gated, gate=GATES[name])


def reference(name: str, inputs: Tensor, tanh_gelu: bool = False) -> Tensor:
    """The formulae, written out in elementary functions."""
    inner = math.sqrt(2 / math.pi)
    erf_gelu = lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    approximate_gelu = lambda x: 0.5 * x * (1 + torch.tanh(inner * (x + 0.044715 * x**3)))  # noqa: E731
    silu = lambda x: x / (1 + torch.exp(-x))  # noqa: E731
    formulae: dict[str, Activation] = {
        "gelu": approximate_gelu if tanh_gelu else erf_gelu,
        "relu": lambda x: x * (x > 0),
        "softsign": lambda x: x / (1 + x.abs()),
        "swish": silu,
        "silu": silu,
        "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "identity": identity,
    }
    gates = {"geglu": "gelu", "swiglu": "silu", "reglu": "relu", "glu": "sigmoid", "bilinear": "identity"}
    if name not in gates:
        return formulae[name](inputs)
    half = inputs.shape[-1] // 2
    return formulae[gates[name]](inputs[..., half:]) * inputs[..., :half]
