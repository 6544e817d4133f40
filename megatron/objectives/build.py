"""What a model is trained to do, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron.data.batch import Batch
from megatron.objectives.language import language_loss

Objective = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""objective(model, batch) -> (sum of the losses fp32, number of trained tokens fp32)."""

_OBJECTIVES: dict[str, Objective] = {"normal": language_loss}


def build_objective(train_impl: str = "normal") -> Objective:
    """Return the objective of a `train_impl` name; "normal" is next-token prediction."""
    return _OBJECTIVES[train_impl]
