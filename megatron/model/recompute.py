"""Activations that are computed again in the backward pass instead of being kept.

One behaviour for every engine and every stage of a pipeline: the same layers are recomputed, with the random numbers
of the first pass (torch.utils.checkpoint keeps the generators' states, so dropout draws the same masks).

Either whole blocks (`Chunk`), or within each block single operations, so that no product with weights is repeated:

    norm         what the norms return, from the residual stream (`made_again.py`)
    activation   of the MLP, from the output of its first linear map (`made_again.py`)
    attention    scores, softmax and dropout, from queries, keys and values (`recomputed`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.config.schema.training import TrainingConfig
from megatron.model.cache import KVCache
from megatron.model.plan import block_number
from megatron.model.stream import Stream

CallLayer = Callable[..., Any]
"""call(index, stream, cache) -> the stream after layer number `index`."""


def recomputed(function: Callable[..., Any], *inputs: Any, draws: bool = True) -> Any:
    """Return function(*inputs), of which only the inputs are kept for the backward pass.

    draws: it uses random numbers, which are drawn again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    hooks = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return checkpoint(function, *inputs, **settings)
    device = next(value for value in inputs if isinstance(value, Tensor)).new_empty(0)  # tells whose numbers are random
    return checkpoint(_Again(function, inputs, *hooks), device, **settings)


class _Again:
    """function(*inputs), once with the inputs themselves and then with what the hooks around have made of them."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...], pack: Any, unpack: Any) -> None:
        self._function = function
        self._first: list[tuple[Any, ...]] = [inputs]
        self._unpack = unpack
        self._kept = [
            (pack(value.detach()), value.requires_grad) if isinstance(value, Tensor) else (value, None)
            for value in inputs
        ]

    def __call__(self, _: Tensor) -> Any:
        if self._first:
            return self._function(*self._first.pop())
        return self._function(*(self._again(*each) for each in self._kept))

    def _again(self, value: Any, requires_grad: bool | None) -> Any:
        return value if requires_grad is None else self._unpack(value).detach().requires_grad_(requires_grad)


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that run together. recomputed: keep only what goes in, and compute the rest again."""

    layers: range
    recomputed: bool = False

    def __call__(self, call: CallLayer, stream: Stream, cache: KVCache | None) -> Stream:
        """Return the stream after these layers."""
        if self.recomputed and torch.is_grad_enabled():
            again: Stream = recomputed(lambda *fields: self._run(call, Stream(*fields), cache), *stream)
            return again
        return self._run(call, stream, cache)

    def _run(self, call: CallLayer, stream: Stream, cache: KVCache | None) -> Stream:
        for index in self.layers:
            stream = call(index, stream, cache)
        return stream


@dataclass(frozen=True)
class Recompute:
    """Which blocks are recomputed whole.

    together: consecutive blocks of which only the first one's input is kept; 0 keeps all.
    first: as many blocks from the model's start; None is all of them.
    """

    together: int = 0
    first: int | None = None

    @classmethod
    def of(cls, training: TrainingConfig) -> Recompute:
        """Return what the config asks for."""
        if not training.checkpoint_activations or training.checkpoint_operations is not None:
            return cls()
        return cls(training.checkpoint_num_layers, training.checkpoint_first_layers)

    def chunks(self, names: Sequence[str], span: range) -> list[Chunk]:
        """Return the layers of `span` in chunks. names: of all layers; only blocks are recomputed."""
        chunks: list[Chunk] = []
        index = span.start
        while index < span.stop:
            end = index + 1
            recomputed = self._includes(names[index])
            while recomputed and end < span.stop and end - index < self.together and self._includes(names[end]):
                end += 1
            chunks.append(Chunk(range(index, end), recomputed))
            index = end
        return chunks

    def _includes(self, name: str) -> bool:
        number = block_number(name)
        return self.together > 0 and number is not None and (self.first is None or number < self.first)


def recomputed_operations(training: TrainingConfig, layer: int) -> frozenset[str]:
    """Return the operations of block number `layer` that are recomputed by themselves."""
    first = training.checkpoint_first_layers
    if not training.checkpoint_activations or (first is not None and layer >= first):
        return frozenset()
    return frozenset(training.checkpoint_operations or ())
