"""One plain module under DeepSpeed's ZeRO 1, 2 or 3.

DeepSpeed averages gradients over the D ranks that hold the same parameters, so each micro-batch is back-propagated as
sum * D / T to be divided by the trained tokens T of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron.engine import zero
from megatron.engine.live import LiveEngine
from megatron.engine.step import MicroBatchEngine, Update
from megatron.engine.verdict import Verdict


class DeepSpeedEngine(LiveEngine, MicroBatchEngine):
    """The Engine of a model without pipeline stages; `engine.build.build_engine` makes it.

    live: what deepspeed.initialize returned.
    objective: computes the loss of one micro-batch.
    """

    @property
    def model(self) -> nn.Module:
        """The model; under ZeRO 3 calling it gathers each layer's parameters while they are needed."""
        module: nn.Module = self._live.module
        return module

    def _callable(self, training: bool) -> Callable[..., Tensor]:
        self._live.train(training)
        live: Callable[..., Tensor] = self._live
        return live

    def _backward(self, loss_sum: Tensor, num_tokens: Tensor) -> None:
        scale = (self._mesh.replicas.size / num_tokens).to(loss_sum.dtype)
        self._live.backward(loss_sum * scale, scale_wrt_gas=False)
        if not self._live.is_gradient_accumulation_boundary():
            self._live.step()  # only counts the micro-batch

    def _update(self, verdict: Verdict) -> Update:
        self._show_gradients(zero.gradients(self.model), self._loss_scale())
        return self._step(verdict, self._live.step)
