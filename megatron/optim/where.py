"""One update of an optimizer that is no AdamW, without waiting for the device to say whether it is to be applied.

Whether a step is left out is known on the device only. torch's SGD has a fused kernel that is told; of the others what
was before is put back where the step is left out. That costs a copy of one parameter and its state at a time, and
reading and writing them twice more, but never a wait of the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from megatron.optim.base import StatefulOptimizer


@torch.no_grad()
def step_where(optimizer: Optimizer, gradients: list[Tensor], coefficient: Tensor) -> None:
    """Do one update with the gradients times `coefficient`; where that is not finite nothing changes.

    gradients: all of the optimizer's, or tensors that they are views of; what becomes of them is not said.
    coefficient: `megatron.ops.adamw.coefficient_of`, an fp32 scalar on their device.
    Raises TypeError for an optimizer of another library.
    """
    is_applied = torch.isfinite(coefficient)
    if isinstance(optimizer, SGD):
        _step_sgd(optimizer, coefficient, is_applied)
    elif isinstance(optimizer, StatefulOptimizer):
        torch._foreach_mul_(gradients, coefficient)
        for parameter, group in optimizer._with_gradient():
            _step_one(optimizer, parameter, group, is_applied)
    else:
        raise TypeError(f"{type(optimizer).__name__} cannot leave out a step by itself")


def _step_one(optimizer: StatefulOptimizer, parameter: Tensor, group: dict[str, object], is_applied: Tensor) -> None:
    state = optimizer.state[parameter]
    if not state:
        state.update(optimizer.initial_state(parameter, group))
    changing = [parameter, *(value for value in state.values() if isinstance(value, Tensor))]
    before = [tensor.clone() for tensor in changing]
    assert parameter.grad is not None
    optimizer._update(parameter, parameter.grad, state, group)
    for tensor, old in zip(changing, before, strict=True):
        torch.where(is_applied, tensor, old, out=tensor)


def _step_sgd(optimizer: SGD, coefficient: Tensor, is_applied: Tensor) -> None:
    """Call the kernel as torch.optim.SGD would, which divides gradients by a scale and heeds a flag."""
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        moving = [optimizer.state[p]["momentum_buffer"] for p in parameters] if group["momentum"] else []
        torch._fused_sgd_(
            parameters,
            [parameter.grad for parameter in parameters],
            moving,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
            grad_scale=coefficient.reciprocal(),
            found_inf=1.0 - is_applied.float(),
        )
