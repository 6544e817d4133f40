"""What apex's FusedAdam and its clipping run, with our signatures; imported only where apex is built and chosen.

apex's kernel for graphs takes rate, step and gradient scale from the device, so that nothing waits for the host; it
leaves the scaled gradient in the gradient's place, and does nothing where its flag is 1.
"""

from __future__ import annotations

import amp_C
import torch
from apex.multi_tensor_apply import multi_tensor_applier
from torch import Tensor

from megatron.ops import adamw

_DECOUPLED = 1  # weight decay, as in AdamW
_CORRECTED = 1  # for the moments' start at zero


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """`megatron.ops.adamw.sum_of_squares`, added up in fp32."""
    flag = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
    norm: Tensor = multi_tensor_applier(
        amp_C.multi_tensor_l2norm, flag, [[tensor.float() for tensor in tensors]], False
    )[0]
    return norm.double().square().squeeze()


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
    """`megatron.ops.adamw.adamw_update_`, with the rounded weights as a copy of their own; moments in bf16 are its."""
    if averages and averages[0].dtype != torch.float32:
        numbers = (rate, beta1, beta2, eps, weight_decay, seed, first)
        adamw.adamw_update_(gradients, masters, averages, squares, weights, coefficient, step, *numbers)
        return
    multi_tensor_applier(
        amp_C.multi_tensor_adam_capturable,
        1 - torch.isfinite(coefficient).int().view(1),
        [[gradient.float() for gradient in gradients], masters, averages, squares],
        _one(rate, step.device),
        beta1,
        beta2,
        eps,
        step.int().view(1),
        _DECOUPLED,
        _CORRECTED,
        weight_decay,
        coefficient.view(1),
    )
    if weights:
        torch._foreach_copy_(weights, masters)


def _one(rate: float | Tensor, device: torch.device) -> Tensor:
    """Return the rate as apex takes it, [1] fp32 on the device."""
    return rate.view(1) if isinstance(rate, Tensor) else torch.full((1,), rate, device=device)
