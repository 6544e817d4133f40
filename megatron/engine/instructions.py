"""DeepSpeed's pipeline instructions, each of which says where the rank is before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.pipe import schedule

from megatron.whereabouts import Phase, enter

Instruction = Callable[..., Any]
_PHASES = {
    schedule.LoadMicroBatch: Phase.LOAD_MICRO_BATCH,
    schedule.RecvActivation: Phase.RECEIVE_ACTIVATION,
    schedule.ForwardPass: Phase.FORWARD,
    schedule.SendActivation: Phase.SEND_ACTIVATION,
    schedule.RecvGrad: Phase.RECEIVE_GRADIENT,
    schedule.BackwardPass: Phase.BACKWARD,
    schedule.SendGrad: Phase.SEND_GRADIENT,
    schedule.ReduceTiedGrads: Phase.GRADIENT_SUM,
    schedule.ReduceGrads: Phase.GRADIENT_SUM,
    schedule.OptimizerStep: Phase.UPDATE,
}
_OF_THE_STEP = (Phase.GRADIENT_SUM, Phase.UPDATE)


class Instructions:
    """Makes instructions that are told. A stage takes each kind once for a micro-batch, in their order, so that the
    n-th of a kind since `start` belongs to micro-batch n."""

    def __init__(self) -> None:
        self._taken: Counter[type] = Counter()

    def start(self) -> None:
        """Begin a schedule: a step, or a validation batch."""
        self._taken.clear()

    def told(self, instructions: Mapping[type, Instruction]) -> dict[type, Instruction]:
        """Return the same map of instruction -> what does it, telling each one's place first."""
        return {kind: self._tell(kind, run) for kind, run in instructions.items()}

    def _tell(self, kind: type, run: Instruction) -> Instruction:
        phase, taken = _PHASES[kind], self._taken

        def tell_and_run(*args: Any, **kwargs: Any) -> Any:
            enter(phase, -1 if phase in _OF_THE_STEP else taken[kind])
            taken[kind] += 1
            return run(*args, **kwargs)

        return tell_and_run
