"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), with DeepSpeed's names and meaning.

The loss is multiplied by the scale, so that small gradients do not vanish in fp16. After `hysteresis` overflows the
scale is halved; after `loss_scale_window` steps without one it is doubled.
"""

from __future__ import annotations

from typing import Any

from megatron.engine.step import diverged

_FACTOR = 2.0


class LossScale:
    """The scale and its counters; the attributes have the names that checkpoints hold.

    settings: the `fp16` block. loss_scale 0 is dynamic, and any other value is kept for ever.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        fixed = float(settings.get("loss_scale", 0))
        self.dynamic = fixed == 0
        self.cur_scale = fixed or _FACTOR ** int(settings.get("initial_scale_power", 16))
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self._window = int(settings.get("loss_scale_window", 1000))
        self._hysteresis = int(settings.get("hysteresis", 2))
        self._consecutive = bool(settings.get("consecutive_hysteresis", False))
        self._minimum = float(settings.get("min_loss_scale", 1))
        self.cur_hysteresis = self._hysteresis

    def update(self, overflow: bool) -> None:
        """Adjust the scale after a step.

        Raises EngineError where it overflows at the smallest scale."""
        if not self.dynamic:
            return
        if overflow:
            self._overflow()
        else:
            self._success()
        self.cur_iter += 1

    def _overflow(self) -> None:
        if self.cur_hysteresis > 1:
            self.cur_hysteresis -= 1
        elif self.cur_scale <= self._minimum:
            raise diverged()
        else:
            self.cur_scale = max(self.cur_scale / _FACTOR, self._minimum)
        self.last_overflow_iter = self.cur_iter

    def _success(self) -> None:
        if self._consecutive:
            self.cur_hysteresis = self._hysteresis
        stable = self.cur_iter - self.last_overflow_iter - 1
        if stable > 0 and stable % self._window == 0:
            self.cur_hysteresis = self._hysteresis
            self.cur_scale *= _FACTOR
