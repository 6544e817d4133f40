"""One pipeline stage: the layers of the model that this rank holds, under the names they have in the whole model.

    stages = StagePlan.of(plans, stages=4, method="parameters")      # from plans alone: no weights are made
    model = StageModel(plans, stages, stage=1, device, dtype, seed)  # builds the layers of stage 1 only

Which layer is where changes no name and no initial weight, so checkpoints know nothing of it. A parameter that layers
of several stages use (tied embeddings, a shared table of positions) is a copy on each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.assemble import Names, build_modules, full_shapes
from megatron.model.plan import LayerPlan, is_block
from megatron.model.planned import SINGLE, PlannedModel
from megatron.model.recompute import Recompute
from megatron.model.stream import Stream
from megatron.parallel.mesh import Axis
from megatron.parallel.pipeline import balanced_bounds, layer_kind, layer_weights


@dataclass(frozen=True)
class StagePlan:
    """The split of a model over stages, the same on every rank.

    titles: the name of each layer plan.
    names: for each layer plan, its parameters: name within the layer -> canonical name.
    shapes: canonical name -> full shape, of the whole model.
    bounds: stage s holds the plans bounds[s] to bounds[s + 1].
    """

    titles: tuple[str, ...]
    names: tuple[Names, ...]
    shapes: Mapping[str, tuple[int, ...]]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, plans: Sequence[LayerPlan], stages: int, method: str, tensor_axis: Axis = SINGLE) -> StagePlan:
        """Split a model by `pipe_partition_method`. plans: are built without memory, and are of no use afterwards.

        Raises ConfigError where there are fewer blocks than stages, or the method finds no layers.
        """
        root = nn.Module()
        modules = build_modules(root, plans, "meta", torch.float32)
        canonical = {id(parameter): name for name, parameter in root.named_parameters()}
        names = tuple({name: canonical[id(p)] for name, p in module.named_parameters()} for module in modules)
        sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
        titles = tuple(plan.name for plan in plans)
        classes = [type(module).__name__ for module in modules]
        kinds = [layer_kind(title, name, is_block(title)) for title, name in zip(titles, classes, strict=True)]
        bounds = balanced_bounds(layer_weights(method, kinds, sizes), stages, [is_block(title) for title in titles])
        return cls(titles, names, full_shapes(root, tensor_axis.size), tuple(bounds))

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.bounds) - 1

    def layers(self, stage: int) -> range:
        """Return the indices of a stage's plans."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def held(self, stage: int) -> set[str]:
        """Return the canonical names of the parameters that a stage holds."""
        return {name for layer in self.layers(stage) for name in self.names[layer].values()}

    def sizes(self) -> list[int]:
        """Return the number of weights of each stage, over all tensor-parallel ranks."""
        return [sum(math.prod(self.shapes[name]) for name in self.held(stage)) for stage in range(self.stages)]

    def shared(self) -> dict[str, list[int]]:
        """Return the parameters that several stages hold, by name, with those stages; the first of them owns it."""
        holders = {name: [s for s in range(self.stages) if name in self.held(s)] for name in self.shapes}
        return {name: stages for name, stages in sorted(holders.items()) if len(stages) > 1}


class StageModel(PlannedModel):
    """The layers of one stage, built, with the weights that they have in the whole model.

    plans: of the whole model; only this stage's are built. The other arguments are as in `PlannedModel`.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        split: StagePlan,
        stage: int,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int | None = 1234,
        tensor_axis: Axis = SINGLE,
        recompute: Recompute | None = None,
        offload: bool = False,
    ) -> None:
        is_first, is_last = stage == 0, stage == split.stages - 1
        held = [plans[index] for index in split.layers(stage)]
        names = [split.names[index] for index in split.layers(stage)]
        super().__init__(held, device, dtype, seed, tensor_axis, recompute, offload, is_first, is_last, names)
        self.split = split
        self.stage = stage
        self.is_first, self.is_last = is_first, is_last

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every weight of the whole model, by canonical name."""
        return dict(self.split.shapes)

    def forward(self, inputs: Any, segments: Tensor | None = None) -> Stream:
        """Return the stream after this stage's layers, all but the head.

        inputs: tokens [b, s] int64 on the first stage, else the stream of the stage before.
        segments: [b, s] int64 document numbers of the tokens, or None.
        """
        return self._through(self._call(0, inputs, segments) if self.is_first else inputs).whole()

    def finish(self, stream: Stream, labels: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        """Return logits, losses or their sum, on the last stage, as `SequentialModel` does."""
        output: Tensor = self._call(len(self.plans) - 1, stream, labels, loss_mask)
        return output
