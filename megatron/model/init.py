"""Weights that depend on the seed and the parameter's name, and on nothing else.

Each full tensor is drawn in fp32 on the CPU from a generator seeded with sha256(seed, canonical name); a rank then
takes its share. So every layout, device and precision starts from the same weights.

    method                          distribution (L layers, hidden size h, sigma = init_method_std)
    normal                          N(0, sigma)
    scaled_normal                   N(0, sigma / sqrt(2 L))
    single_residual_scaled_normal   N(0, sigma / sqrt(L))
    small_init                      N(0, sqrt(2 / (5 h)))                 Nguyen & Salazar 2019
    wang_init                       N(0, 2 / (L sqrt(h)))                 Wang & Komatsuzaki, GPT-J
    xavier_uniform, xavier_normal   Glorot & Bengio 2010, gain 1
    orthogonal                      orthonormal rows or columns, gain sqrt(2)
    scaled_orthogonal               the same, gain sqrt(2 / L)
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from megatron.parallel.layers import Initializer, get_initializer
from megatron.parallel.mesh import Axis
from megatron.parallel.rng import hash_seed
from megatron.parallel.sharding import get_spec, split


def make_initializer(method: str, std: float, num_layers: int, hidden_size: int) -> Initializer:
    """Return the initializer of an `init_method` name; the table above gives its distribution."""
    deviations = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2 * num_layers),
        "single_residual_scaled_normal": std / math.sqrt(num_layers),
        "small_init": math.sqrt(2 / (5 * hidden_size)),
        "wang_init": 2 / (num_layers * math.sqrt(hidden_size)),
    }
    others: dict[str, Initializer] = {
        "xavier_uniform": xavier_uniform,
        "xavier_normal": xavier_normal,
        "orthogonal": partial(orthogonal, gain=math.sqrt(2)),
        "scaled_orthogonal": partial(orthogonal, gain=math.sqrt(2 / num_layers)),
    }
    if method in deviations:
        return partial(normal, std=deviations[method])
    return others[method]


def normal(shape: tuple[int, ...], generator: torch.Generator, std: float) -> Tensor:
    """Draw from N(0, std)."""
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def xavier_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from U(-a, a) with a = sqrt(6 / (fan_in + fan_out))."""
    return nn.init.xavier_uniform_(torch.empty(shape, device="cpu"), generator=generator)


def xavier_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from N(0, sqrt(2 / (fan_in + fan_out)))."""
    return nn.init.xavier_normal_(torch.empty(shape, device="cpu"), generator=generator)


def orthogonal(shape: tuple[int, ...], generator: torch.Generator, gain: float) -> Tensor:
    """Draw a (semi-)orthogonal matrix times `gain` (Saxe et al. 2013)."""
    return nn.init.orthogonal_(torch.empty(shape, device="cpu"), gain=gain, generator=generator)


@torch.no_grad()
def initialize(module: nn.Module, prefix: str, seed: int, axis: Axis) -> None:
    """Fill every parameter of `module` in place.

    prefix: the module's canonical name; parameter p is drawn under the name `<prefix>.<p>`, or `<p>` without a prefix.
    axis: the tensor axis, of which this rank takes its share.
    """
    for name, parameter in module.named_parameters():
        spec = get_spec(parameter)
        shape = list(parameter.shape)
        if spec.dim is not None:
            shape[spec.dim] *= axis.size
        generator = torch.Generator(device="cpu").manual_seed(hash_seed(seed, f"{prefix}.{name}" if prefix else name))
        full = get_initializer(parameter)(tuple(shape), generator)
        parameter.copy_(split(full, spec, axis.size, axis.rank))
