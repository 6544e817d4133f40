"""AdamW under DeepSpeed in one pass: the update itself scales and clips gradients and rounds weights.

DeepSpeed's optimizers multiply the gradients by what un-scales and clips them, call AdamW, and round its masters into
the weights: three passes over memory. Here AdamW is `optim/one_pass.py`'s, which is handed the factor,

    1 / max(1, (norm + 1e-6) / clip) / loss scale

and, by ZeRO 3 and BF16_Optimizer, the weights. When they step, and by which norm, stays theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron.config.schema.config import Config
from megatron.ops.adamw import coefficient_of
from megatron.ops.choice import Situation
from megatron.optim.one_pass import OnePassAdamW, one_pass
from megatron.parallel.mesh import Mesh


def update_at_once(optimizer: Any, config: Config, mesh: Mesh) -> OneUpdate | None:
    """Let a live optimizer of DeepSpeed's update in one pass, and return what does; None where it is no AdamW of ours.

    Call it once, before training. What an optimizer keeps on the CPU is DeepSpeed's to update."""
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        return None
    make = _KINDS.get(type(optimizer))
    situation = Situation(mesh.device, getattr(optimizer, "dtype", torch.bfloat16), config.model.hidden_size)
    update = one_pass(config, optimizer.optimizer, {}, situation)
    return None if make is None or update is None else make(optimizer, update, mesh.device)


class OneUpdate:
    """The `step` of the AdamW within a ZeRO optimizer.

    parts: the gradients that a flat master's consists of, by the master's id, in order, where it has none of its own.
    They are let go of by the update. squares: the operation `sum_of_squares`.
    """

    def __init__(self, optimizer: Any, update: OnePassAdamW, device: torch.device) -> None:
        self._optimizer, self._update, self._device = optimizer, update, device
        self.parts: dict[int, Sequence[Tensor]] = {}
        self.squares = update.squares
        optimizer.optimizer.step = self.step

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters that the groups list at present."""
        coefficient = self._coefficient()
        for group in self._optimizer.optimizer.param_groups:
            if not group["params"]:
                continue  # its turn is another
            gradients = [self.parts.pop(id(master), master.grad) for master in group["params"]]
            self._update.update(group, gradients, self._weights(group), coefficient, torch.ones_like(coefficient))

    def _coefficient(self) -> Tensor:
        raise NotImplementedError

    def _weights(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the rounded copies of a group's masters, or nothing where the optimizer rounds them."""
        return []

    def _factor(self, norm: Tensor | None) -> Tensor:
        """Return the factor at the top, an fp32 scalar. norm: of the scaled gradient; None where nobody needed it."""
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        known = torch.zeros((), device=self._device) if norm is None else norm.to(self._device)
        known = known.double()  # as our own engine has it
        return coefficient_of(known / scale, scale, float(self._optimizer.clip_grad))


class _ByParts(OneUpdate):
    """Of ZeRO 1 to 3, which ask for their gradients to be scaled, one group after another."""

    def __init__(self, optimizer: Any, update: OnePassAdamW, device: torch.device) -> None:
        super().__init__(optimizer, update, device)
        self._noted: Tensor | None = None
        optimizer.unscale_and_clip_grads = self.note

    def note(self, gradients: Any, norm: Tensor | None) -> None:
        """Note the factor of the next update; in the place of what multiplies gradients by it."""
        self._noted = self._factor(norm)

    def _coefficient(self) -> Tensor:
        assert self._noted is not None, "an update before its gradients were scaled"
        return self._noted


class _Stage3(_ByParts):
    """Of ZeRO 3, which updates one sub-group after another."""

    def __init__(self, optimizer: Any, update: OnePassAdamW, device: torch.device) -> None:
        super().__init__(optimizer, update, device)
        self._group: int | None = None  # whose weights the update rounds
        self._publish = optimizer._reassign_or_swap_out_partitioned_parameters
        optimizer._reassign_or_swap_out_partitioned_parameters = self.publish

    def note(self, gradients: int, norm: Tensor | None) -> None:
        """Note the factor and the number of the sub-group."""
        super().note(gradients, norm)
        self._group = gradients

    def publish(self, group: int) -> None:
        """Make a sub-group's weights those of its masters."""
        if group == self._group:  # the update wrote them
            self._optimizer._unflatten_partitioned_parameters(group)
        else:
            self._publish(group)
        self._group = None

    def _weights(self, group: dict[str, Any]) -> list[Tensor]:
        rounded = self._optimizer.fp16_partitioned_groups_flat[self._group]
        return [] if rounded.dtype == group["params"][0].dtype else [rounded.data]


class _Bf16(OneUpdate):
    """Of BF16_Optimizer, which clips the gradients that it is given, and updates all groups at once."""

    def __init__(self, optimizer: Any, update: OnePassAdamW, device: torch.device) -> None:
        super().__init__(optimizer, update, device)
        self._gradients = optimizer.get_grads_for_norm
        optimizer.get_grads_for_norm = self.gradients

    def gradients(self, for_clipping: bool = False) -> Any:
        """Return the gradients for the norm, and none that are to be clipped."""
        return [] if for_clipping else self._gradients()

    def _coefficient(self) -> Tensor:
        return self._factor(self._optimizer._global_grad_norm)


_KINDS: dict[type, type[OneUpdate]] = {
    BF16_Optimizer: _Bf16,
    DeepSpeedZeroOptimizer: _ByParts,
    DeepSpeedZeroOptimizer_Stage3: _Stage3,
}
