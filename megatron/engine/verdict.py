"""Whether the update of a step is applied, decided where its numbers are: on the device, without a word to the host.

An update is left out where the loss or the gradient's norm is not finite, or above a limit that was known before the
step. Loss and norm are sums over all ranks, alike to the last bit, so all ranks decide alike; the next step's
sum over the ranks carries what each decided, and a rank that differs ends the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.engine.base import Limits


@dataclass(frozen=True)
class Bounds:
    """Limits that stand on the device, fp64 scalars: a step that is recorded reads them there."""

    loss: Tensor
    grad_norm: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Bounds:
        """Return new ones."""
        return cls(*(torch.full((), math.inf, dtype=torch.float64, device=device) for _ in range(2)))

    def tell(self, limits: Limits) -> None:
        """Take the limits of the next step; the device is not waited for."""
        self.loss.fill_(limits.loss)
        self.grad_norm.fill_(limits.grad_norm)


@dataclass(frozen=True)
class Verdict:
    """What decides on one step. loss: mean over its trained tokens, nats, fp64 scalar on the device."""

    loss: Tensor
    limits: Limits | Bounds

    def refuses(self, norm: Tensor) -> Tensor:
        """Return whether an update is left out, bool scalar on the device. norm: of the unclipped gradient, fp64."""
        refused = ~torch.isfinite(norm + (self.loss - self.loss))
        if isinstance(self.limits.loss, Tensor) or self.limits.loss < math.inf:
            refused = refused | (self.loss > self.limits.loss)
        if isinstance(self.limits.grad_norm, Tensor) or self.limits.grad_norm < math.inf:
            refused = refused | (norm > self.limits.grad_norm)
        return refused

    def allows(self, norm: float) -> bool:
        """Return whether an update is applied, for an optimizer whose host has read the norm; it reads the loss too."""
        loss = float(self.loss)
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        return is_finite and bool(loss <= self.limits.loss and norm <= self.limits.grad_norm)
