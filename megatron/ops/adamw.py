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


def adamw_update_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update masters, their moments and the weights in place, by PyTorch's fused kernel and a copy.

    gradients, masters, averages, squares: fp32, of the same shapes; what becomes of the gradients is not said.
    weights: the masters' rounded copies, of one dtype, or an empty list. coefficient: from `coefficient_of`; where it
    is not finite nothing changes. step: t of this update, an fp32 scalar on the device.
    """
    torch._fused_adamw_(
        masters,
        gradients,
        averages,
        squares,
        [],
        [step] * len(masters),
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


def adamw_update_reference_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The formula of `adamw_update_`."""
    is_finite = torch.isfinite(coefficient)
    correction, root = bias_corrections(step, beta1, beta2)
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
