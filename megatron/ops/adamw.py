"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on lists of tensors, with clipping and without a word to the host.

    g <- coefficient * g;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- (1 - rate * decay) p - rate * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);   weight <- round(p)

The coefficient un-scales and clips the gradient. Where it is not finite nothing changes, t included.

Arithmetic is fp32. Moments may be kept in bf16, whose steps of 2^-8 are larger than what an update adds to v where b2
is 0.99 or more: rounded to the nearest they would stand still. So they are rounded up or down at random, up with a
probability that makes the mean exact (Gupta et al. 2015, "Deep learning with limited numerical precision"). The random
bits are a function of (seed, t, number of the tensor, element), the same in every implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, an fp64 scalar on the tensors' device; halves count as fp32."""
    norms = [norm for group in _groups(tensors) for norm in torch._foreach_norm(_in_fp32(tensors[group]))]
    return torch.stack(norms).double().square().sum()


def coefficient_of(norm: Tensor, loss_scale: float | Tensor, clip: float) -> Tensor:
    """Return what gradients are to be multiplied with, an fp32 scalar on the device; NaN where the norm is not finite.

    norm: of the un-scaled gradient, fp64 scalar. loss_scale: what gradients are larger by. clip: the largest norm, 0
    for any.
    """
    shrink = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm)
    # An infinite norm would give the coefficient 0; the difference makes it NaN.
    return (1.0 / (shrink * loss_scale) + (norm - norm)).float()


def bias_corrections(step: Tensor, beta1: float, beta2: float) -> Tensor:
    """Return 1 / (1 - b1^t) and 1 / sqrt(1 - b2^t), [2] fp32 on the device of t, an fp32 scalar."""
    count = step.double().clamp(min=1.0)
    return torch.stack(((1.0 - beta1**count).reciprocal(), (1.0 - beta2**count).rsqrt())).float()


def decay_of(rate: float | Tensor, weight_decay: float) -> float | Tensor:
    """Return 1 - rate * weight_decay: a number, or an fp32 scalar on the rate's device, rounded as the number is."""
    return (1.0 - rate.double() * weight_decay).float() if isinstance(rate, Tensor) else 1.0 - rate * weight_decay


def adamw_update_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = 0,
    first: int = 0,
) -> None:
    """Update masters, their moments and the weights in place, by PyTorch's fused kernel and a copy.

    gradients, masters, averages, squares: fp32, of the same shapes; what becomes of the gradients is not said, and they
    may be halves, which count as their fp32 copies. The
    averages and squares may be bf16, which are rounded by `seed` and the tensors' numbers, counted from `first`.
    weights: the masters' rounded copies, of one dtype, or an empty list. coefficient: from `coefficient_of`; where it
    is not finite nothing changes. step: t of this update, an fp32 scalar on the device. rate: a number, or an fp32
    scalar on the device, for an update that is recorded.
    """
    if averages and averages[0].dtype != torch.float32:
        lists = gradients, masters, averages, squares, weights
        numbers: tuple[Any, ...] = rate, beta1, beta2, eps, weight_decay, seed, first
        adamw_update_reference_(*lists, coefficient, step, *numbers)
        return
    for group in _groups(gradients):
        torch._fused_adamw_(
            masters[group],
            _in_fp32(gradients[group]),
            averages[group],
            squares[group],
            [],
            [step] * len(masters[group]),
            amsgrad=False,
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
            grad_scale=coefficient.reciprocal(),
            found_inf=1.0 - torch.isfinite(coefficient).float(),
        )
    if weights:
        torch._foreach_copy_(weights, masters)


def _groups(gradients: list[Tensor]) -> list[slice]:
    """Return all places of the list, in groups that are converted to fp32 at once; one group where nothing is."""
    if not gradients or gradients[0].dtype == torch.float32:
        return [slice(0, len(gradients))]
    starts, elements = [0], 0
    for place, gradient in enumerate(gradients):
        elements += gradient.numel()
        if elements > _CONVERTED and place > starts[-1]:
            starts.append(place)
            elements = gradient.numel()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(gradients)], strict=True)]


def _in_fp32(gradients: list[Tensor]) -> list[Tensor]:
    return [gradient.float() for gradient in gradients]


_CONVERTED = 2**24
"""Elements of gradients whose fp32 copies are there at once, unless one gradient has more."""


def adamw_update_reference_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = 0,
    first: int = 0,
) -> None:
    """The formula of `adamw_update_`, block by block."""
    is_finite = torch.isfinite(coefficient)
    if coefficient.device.type == "cpu" and not is_finite:
        return
    (correction, root), decay = bias_corrections(step, beta1, beta2), decay_of(rate, weight_decay)
    key, size = noise_key(seed, step), _BLOCK.get(coefficient.device.type, 2**26)
    for index, tensors in enumerate(zip(gradients, masters, averages, squares, strict=True)):
        for start in range(0, tensors[0].numel(), size):
            gradient, master, average, square = (tensor.reshape(-1)[start : start + size] for tensor in tensors)
            gradient = gradient.float() * coefficient
            new_average = torch.lerp(average.float(), gradient, 1.0 - beta1)
            new_square = (square.float() * beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            change = new_average / new_square.sqrt().mul_(root).add_(eps)
            new_master = (master * decay).sub_(change.mul_(rate * correction))
            if average.dtype == torch.bfloat16:
                bits = noise(key, first + index, start, average.numel())
                new_average = round_at_random(new_average, bits & 0xFFFF)
                new_square = round_at_random(new_square, (bits >> 16).bitwise_and_(0xFFFF))
            for old, new in ((master, new_master), (average, new_average), (square, new_square)):
                old.copy_(new if old.device.type == "cpu" else torch.where(is_finite, new, old.float()))
        if weights:
            weights[index].copy_(masters[index])


_BLOCK = {"cpu": 2**17, "cuda": 2**26}
"""Elements that the formula computes at once, so that what it needs beside the state stays small: on a CPU in its
cache, where 38 million parameters take 0.4 s on a core (PyTorch's fused kernel with fp32 moments: 0.04)."""

GOLDEN, MIX1, MIX2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
"""2^32 over the golden ratio, and the factors of MurmurHash3's finaliser."""


def noise_key(seed: int, step: Tensor) -> Tensor:
    """Return what tells the random bits of update t from all others, an int32 scalar on the device of t."""
    return _mixed(step.to(torch.int32) * _signed(GOLDEN) + _signed(seed))


def noise(key: Tensor, number: int, start: int, count: int) -> Tensor:
    """Return 32 random bits for each of `count` elements from `start` of tensor `number`, int32."""
    of_tensor = _mixed(key + _signed(number * MIX1))
    elements = torch.arange(count, dtype=torch.int32, device=key.device)
    return _mixed(elements.mul_(_signed(GOLDEN)).add_(of_tensor + _signed(start * GOLDEN)))


def round_at_random(values: Tensor, bits: Tensor) -> Tensor:
    """Return fp32 values as the next bf16 numbers towards or away from 0, in fp32.

    bits: int32 in [0, 2^16); a value that lies a share p of the way to the next number is rounded to it in p 2^16
    cases."""
    return (values.view(torch.int32) + bits).bitwise_and_(-0x10000).view(torch.float32)


def _mixed(bits: Tensor) -> Tensor:
    """Return int32 bits scattered: MurmurHash3's finaliser (Appleby 2011)."""
    bits = ((bits >> 16).bitwise_and_(0xFFFF)).bitwise_xor_(bits).mul_(_signed(MIX1))
    bits = ((bits >> 13).bitwise_and_(0x7FFFF)).bitwise_xor_(bits).mul_(_signed(MIX2))
    return ((bits >> 16).bitwise_and_(0xFFFF)).bitwise_xor_(bits)


def _signed(number: int) -> int:
    """Return the low 32 bits of a number as an int32."""
    return (number & 0xFFFFFFFF) - ((number & 0x80000000) << 1)
