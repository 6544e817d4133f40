"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on lists of tensors, with clipping and without a word to the host.

    g <- coefficient * g;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- (1 - rate * decay) p - rate * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);   weight <- round(p)

The coefficient un-scales and clips the gradient. Where it is not finite nothing changes, t included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, an fp64 scalar on the tensors' device."""
    norms = torch.stack(torch._foreach_norm(tensors)).double()
    return norms.square().sum()


def step_scalars(norm: Tensor, step: Tensor, loss_scale: float, clip: float, beta1: float, beta2: float) -> Tensor:
    """Return what an update takes, [3] fp32 on the device: the coefficient, 1 / (1 - b1^t) and 1 / sqrt(1 - b2^t).

    norm: of the gradient, fp64 scalar. step: t, fp32 scalar, both on the device. loss_scale: what gradients that are
    to be updated with are larger by. clip: the largest norm, 0 for any. Where the norm is not finite, nor is the
    coefficient.
    """
    shrink = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm)
    # An infinite norm would give the coefficient 0; the difference makes it NaN.
    coefficient = 1.0 / (shrink * loss_scale) + (norm - norm)
    count = step.double().clamp(min=1.0)
    return torch.stack((coefficient, (1.0 - beta1**count).reciprocal(), (1.0 - beta2**count).rsqrt())).float()


def adamw_update_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    scalars: Tensor,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update masters, their moments and the weights in place: the formula.

    gradients, masters, averages, squares: fp32, of the same shapes. weights: the masters' rounded copies, of one
    dtype, or an empty list. scalars [3]: from `step_scalars`.
    """
    is_finite = torch.isfinite(scalars[0])
    coefficient, correction, root = scalars
    for index, (gradient, master) in enumerate(zip(gradients, masters, strict=True)):
        gradient = gradient * coefficient
        average = torch.lerp(averages[index], gradient, 1.0 - beta1)
        square = squares[index] * beta2 + (1.0 - beta2) * gradient.square()
        change = rate * correction * average / (square.sqrt() * root + eps)
        for old, new in (
            (averages[index], average),
            (squares[index], square),
            (master, master * (1.0 - rate * weight_decay) - change),
        ):
            old.copy_(torch.where(is_finite, new, old))
        if weights:
            weights[index].copy_(master)
