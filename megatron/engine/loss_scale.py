"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), with DeepSpeed's names and meaning.

The loss is multiplied by the scale, so that small gradients do not vanish in fp16. After `hysteresis` overflows the
scale is halved; after `loss_scale_window` steps without one it is doubled. Scale and counters are scalars on the
device, where it is known whether a step overflowed, so that nobody waits for it. They stay where they are, so that an
update that is recorded finds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FACTOR = 2.0
_CPU = torch.device("cpu")


class LossScale:
    """The scale and its counters; the attributes have the names that checkpoints hold.

    settings: the `fp16` block. loss_scale 0 is dynamic, and any other value is kept for ever.
    """

    def __init__(self, settings: dict[str, Any], device: torch.device = _CPU) -> None:
        fixed = float(settings.get("loss_scale", 0))
        self.dynamic = fixed == 0
        scale = fixed or _FACTOR ** int(settings.get("initial_scale_power", 16))
        self.cur_scale = torch.tensor(scale, dtype=torch.float64, device=device)
        self.cur_iter = torch.tensor(0, device=device)
        self.last_overflow_iter = torch.tensor(-1, device=device)
        self._window = int(settings.get("loss_scale_window", 1000))
        self._hysteresis = int(settings.get("hysteresis", 2))
        self._consecutive = bool(settings.get("consecutive_hysteresis", False))
        self._minimum = float(settings.get("min_loss_scale", 1))
        self.cur_hysteresis = torch.tensor(self._hysteresis, device=device)

    def update(self, overflow: Tensor) -> Tensor:
        """Adjust the scale after a step, and return whether it overflowed at the smallest scale: the run has diverged.

        overflow, and what is returned: bool scalars on the device."""
        if not self.dynamic:
            return torch.zeros_like(overflow)
        is_due = overflow & (self.cur_hysteresis <= 1)
        diverged = is_due & (self.cur_scale <= self._minimum)
        stable = self.cur_iter - self.last_overflow_iter - 1
        grows = ~overflow & (stable > 0) & (stable % self._window == 0)
        smaller = (self.cur_scale / _FACTOR).clamp(min=self._minimum)
        scale = torch.where(is_due & ~diverged, smaller, self.cur_scale)
        spent = torch.where(overflow & ~is_due, self.cur_hysteresis - 1, self.cur_hysteresis)
        is_renewed = ~overflow if self._consecutive else grows
        self.cur_scale.copy_(torch.where(grows, scale * _FACTOR, scale))
        self.cur_hysteresis.copy_(torch.where(is_renewed, self._hysteresis, spent))
        self.last_overflow_iter.copy_(torch.where(overflow, self.cur_iter, self.last_overflow_iter))
        self.cur_iter.add_(1)
        return diverged
