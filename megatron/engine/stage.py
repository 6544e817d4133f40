"""A StageModel as the PipelineModule that DeepSpeed's pipeline engine runs.

DeepSpeed owns the schedule, the exchange between stages and the optimizer. Which layers a stage has, what they are
named and how they are run stays ours: a StageModel is built already, so nothing is built a second time to be counted.

Stages exchange tuples of tensors, (hidden,) or (hidden, auxiliary_loss), each of which has a gradient. Documents
(segments) and labels are not sent: every rank of a pipeline reads the same batches.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence

import deepspeed.comm as dist
import torch
from deepspeed.runtime.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from megatron.data.batch import Batch
from megatron.model.stage import StageModel
from megatron.model.stream import Stream
from megatron.objectives.build import Objective
from megatron.parallel.mesh import Mesh

_COPY = "ds_pipe_replicated"  # DeepSpeed's name


class Feed:
    """The micro-batches of a step, taken one by one as the schedule runs their forward passes.

    scale: what a micro-batch's loss is multiplied by before its backward pass. before: called with the number of
    the micro-batch before each forward pass. tell: called with its number, the sum of its losses, and itself, on the
    last stage.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        scale: Tensor,
        before: Callable[[int], None],
        device: torch.device,
        tell: Callable[[int, Tensor, Batch], None] | None = None,
    ):
        self.scale = scale
        self._tell = tell
        self.losses = torch.zeros((), dtype=torch.float64, device=device)
        self._batches = batches
        self._before = before
        self._device = device
        self._next = 0

    def take(self) -> Batch:
        """Return the next micro-batch, on the device."""
        self._before(self._next)
        self._next += 1
        return self._batches[self._next - 1].to(self._device)

    def take_loss(self, loss_sum: Tensor) -> None:
        """Add the losses of the micro-batch that was taken last."""
        self.losses += loss_sum
        if self._tell is not None:
            self._tell(self._next - 1, loss_sum, self._batches[self._next - 1])


class PipelineStage(PipelineModule):
    """What DeepSpeed runs as its stage; `feed` must be set before each step.

    objective: is given the head of the last stage as its model, so that one definition of the loss serves all engines.
    """

    feed: Feed

    def __init__(self, model: StageModel, mesh: Mesh, objective: Objective) -> None:
        self._given = [model]  # in a list, since torch takes no module before its own constructor ran
        self._objective = objective
        self._batch: Batch | None = None
        # Context ranks hold the same parameters as data ranks do, and to DeepSpeed they are that.
        topology = PipeModelDataParallelTopology(mesh.pp.size, mesh.tp.size, mesh.replicas.size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology and its layers
            super().__init__(layers=range(len(model.split.names)), topology=topology, loss_fn=self._loss)

    @property
    def model(self) -> StageModel:
        """This stage's part of the model."""
        return self._given[0]

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the next micro-batch of the feed. inputs: tokens [b, s] on the first stage, else what `pack` made."""
        self._batch = batch = self.feed.take()
        received = inputs if isinstance(inputs, Tensor) else unpack(inputs, batch.segments)
        return pack(self.model(received, batch.segments))

    def _loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the loss of the micro-batch that `forward` just ran, scaled; DeepSpeed calls it on the last stage."""
        assert self._batch is not None
        stream = unpack(outputs, self._batch.segments)

        def head(tokens: Tensor, labels: Tensor, loss_mask: Tensor, segments: Tensor | None) -> Tensor:
            return self.model.finish(stream, labels, loss_mask)

        loss, _ = self._objective(head, self._batch)
        self.feed.take_loss(loss.detach())
        return loss * self.feed.scale.to(loss.dtype)

    def _partition_layers(self, method: str = "") -> None:
        """Tell DeepSpeed which layers are where."""
        self.parts = list(self.model.split.bounds)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _build(self) -> None:
        """Take the layers that are built; a parameter that stages share counts in the norm of its first one only."""
        self.stage = self.model
        shared = self.model.split.shared()
        for name, parameter in self.stage.named_parameters():
            setattr(parameter, _COPY, name in shared and shared[name][0] != self.stage_id)

    @torch.no_grad()  # a broadcast in place of what has a gradient is a warning
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    def _index_tied_modules(self) -> dict[str, dict[str, object]]:
        """Return the groups over which shared parameters are made equal, and their gradients summed."""
        comms: dict[str, dict[str, object]] = {}
        for name, stages in self.model.split.shared().items():
            for ranks in self._pipelines(stages):
                group = dist.new_group(ranks=ranks)  # by every rank, and in the same order
                if self.global_rank in ranks:
                    owner, _, attribute = name.rpartition(".")
                    module = self.stage.get_submodule(owner)
                    key = name.replace(".", "/")  # torch allows no dots in the names of modules
                    self.tied_modules[key] = module
                    comms[key] = {"ranks": ranks, "group": group, "weight_attr": [attribute], "module": module}
        return comms

    def _pipelines(self, stages: Sequence[int]) -> Iterator[list[int]]:
        """Yield the ranks of these stages in each pipeline."""
        for replica in range(self._topo.get_dim("data")):
            for share in range(self._topo.get_dim("model")):
                yield [self._topo.get_rank(pipe=stage, data=replica, model=share) for stage in stages]


def is_copy(parameter: Tensor) -> bool:
    """Return whether an earlier stage owns this parameter, which counts in the norm and in checkpoints only there."""
    return bool(getattr(parameter, _COPY))


def pack(stream: Stream) -> tuple[Tensor, ...]:
    """Return what one stage sends the next."""
    tensors = (stream.hidden, stream.auxiliary_loss)
    return tuple(tensor for tensor in tensors if tensor is not None)


def unpack(tensors: tuple[Tensor, ...], segments: Tensor | None) -> Stream:
    """Return the stream that `pack` made the tensors of."""
    hidden, *auxiliary = tensors
    return Stream(hidden, segments, auxiliary[0] if auxiliary else None)
