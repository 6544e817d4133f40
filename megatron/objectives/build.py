"""What a model is trained to do, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron.data.batch import Batch
from megatron.objectives.language import language_loss

Objective = Callable[[Callable[..., Tensor], Batch], tuple[Tensor, Tensor]]
"""(model, batch) -> (sum of the losses of the micro-batch, an fp32 scalar with gradient; its trained tokens)."""

_OBJECTIVES: dict[str, Objective] = {"normal": language_loss}


def build_objective(train_impl: str = "normal") -> Objective:
    """Return the objective of a `train_impl` name; "normal" is next-token prediction."""
    return _OBJECTIVES[train_impl]
