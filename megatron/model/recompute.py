"""Activations that are computed again in the backward pass instead of being kept.

One behaviour for every engine and every stage of a pipeline: the same layers are recomputed, with the random numbers
of the first pass (torch.utils.checkpoint keeps the generators' states, so dropout draws the same masks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron.model.cache import KVCache
from megatron.model.plan import is_block
from megatron.model.stream import Stream

CallLayer = Callable[..., Any]
"""call(index, stream, cache) -> the stream after layer number `index`."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that run together. recomputed: keep only what goes in, and compute the rest again."""

    layers: range
    recomputed: bool = False

    def __call__(self, call: CallLayer, stream: Stream, cache: KVCache | None) -> Stream:
        """Return the stream after these layers."""
        if self.recomputed and torch.is_grad_enabled():
            output: Stream = checkpoint(self._run, call, stream, cache, use_reentrant=False)
            return output
        return self._run(call, stream, cache)

    def _run(self, call: CallLayer, stream: Stream, cache: KVCache | None) -> Stream:
        for index in self.layers:
            stream = call(index, stream, cache)
        return stream


@dataclass(frozen=True)
class Recompute:
    """What is recomputed. layers: consecutive blocks of which only the first one's input is kept; 0 keeps all."""

    layers: int = 0

    def chunks(self, names: Sequence[str], span: range) -> list[Chunk]:
        """Return the layers of `span` in chunks. names: of all layers; only blocks are recomputed."""
        chunks: list[Chunk] = []
        index = span.start
        while index < span.stop:
            end = index + 1
            recomputed = self.layers > 0 and is_block(names[index])
            while recomputed and end < span.stop and end - index < self.layers and is_block(names[end]):
                end += 1
            chunks.append(Chunk(range(index, end), recomputed))
            index = end
        return chunks
