"""CUDA graphs of a micro-batch: its forward and its backward pass, each launched as one piece.

A small model is done with a kernel before the host has launched the next. torch.cuda.make_graphed_callables records
the kernels of both passes once, for batches of one shape, which are then copied into the buffers of the recording.
Gradients leave the recording as from any backward pass, so accumulation, reduction and update stay as they are. Random
streams are seeded before each micro-batch as without graphs: a replay reads the seed anew. Evaluation is not recorded,
nor is the update: the learning rate, which changes at each step, is a number of the host in its kernels.

No part of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.errors import ConfigError, Problem
from megatron.parallel.mesh import Mesh

Model = Callable[..., Tensor]


def obstacle(config: Config, mesh: Mesh) -> str:
    """Return why micro-batches of a run cannot be recorded, or ""."""
    training = config.training
    reads_generator = training.checkpoint_operations is None or "attention" in training.checkpoint_operations
    if mesh.device.type != "cuda":
        return f"they need a CUDA device, and this is {mesh.device.type}."
    if mesh.tp.size > 1 or mesh.cp.size > 1:
        return "processes that share a layer or a sequence meet within a micro-batch."
    if training.checkpoint_activations and reads_generator:
        return "recomputation reads the random generator's state, which a recording cannot."
    if training.offload_activations:
        return "offload_activations copies to the CPU within a micro-batch."
    if config.optimizer.optimizer_in_backward:
        return "optimizer_in_backward updates weights within a micro-batch."
    return ""


def require_recordable(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError where graphs are asked for and cannot be recorded."""
    reason = obstacle(config, mesh)
    if config.kernels.cuda_graphs is True and reason:
        raise ConfigError(Problem("cuda_graphs = true", reason, "Set cuda_graphs: auto."))


class RecordedModel:
    """A model whose training passes are recorded with the first batch, and replayed for all batches like it.

    record: torch.cuda.make_graphed_callables, or what stands for it: (module, example inputs) -> module.
    """

    def __init__(self, model: nn.Module, record: Callable[..., Any] = torch.cuda.make_graphed_callables) -> None:
        self._model, self._record = model, record
        self._replay: Callable[..., Tensor] | None = None
        self._key: tuple[object, ...] = ()

    def record(self, batch: Batch) -> None:
        """Record the passes, unless that is done; `batch` gives shapes, and its contents are not trained on.

        Whoever draws random numbers for it seeds again behind it."""
        if self._replay is None and batch.segments is None:
            inputs = (batch.tokens.clone(), batch.labels.clone(), batch.loss_mask.clone())
            self._key = _key(inputs)
            self._replay = self._record(_Positional(self._model), inputs)

    def __call__(self, tokens: Tensor, labels: Tensor, loss_mask: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the sum of the losses: by replay if the batch is like the recorded one, else as without graphs."""
        inputs = (tokens, labels, loss_mask)
        if self._replay is not None and segments is None and _key(inputs) == self._key:
            return self._replay(*inputs)
        total: Tensor = self._model(tokens, labels=labels, loss_mask=loss_mask, segments=segments)
        return total


class _Positional(nn.Module):
    """The model with positional inputs, which are all that can be recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        total: Tensor = self.model(tokens, labels=labels, loss_mask=loss_mask)
        return total


def _key(inputs: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
