"""Layer plans as a module that holds and calls them: what a whole model and a pipeline stage have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from megatron.model.assemble import Names, build_modules, fill
from megatron.model.cache import KVCache
from megatron.model.offload import Offload
from megatron.model.plan import LayerPlan, is_block
from megatron.model.recompute import Recompute
from megatron.model.stream import Stream
from megatron.parallel.mesh import Axis

SINGLE = Axis("tp")
"""The tensor axis of one process."""


class PlannedModel(nn.Module):
    """Builds the plans in order.

    device, dtype: of all parameters.
    seed: of the initial weights; None makes them zeros, for a checkpoint to fill.
    tensor_axis: the axis that the plans were made for; this rank takes its share of each initial tensor.
    recompute: which activations are computed again in the backward pass; None keeps all.
    offload: take what the blocks keep for the backward pass to the CPU's memory.
    has_first, has_last: whether the first of the plans turns tokens into hidden states, and the last is the head.
    names: as in `build_modules`.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int | None = 1234,
        tensor_axis: Axis = SINGLE,
        recompute: Recompute | None = None,
        offload: bool = False,
        has_first: bool = True,
        has_last: bool = True,
        names: Sequence[Names] | None = None,
    ) -> None:
        super().__init__()
        self.plans = tuple(plans)
        self._in_order = build_modules(self, self.plans, device, dtype, names)
        fill(self, seed, tensor_axis)
        self.tensor_size = tensor_axis.size
        middle = range(int(has_first), len(self.plans) - int(has_last))
        self._chunks = (recompute or Recompute()).chunks([plan.name for plan in self.plans], middle)
        self._offload = Offload() if offload else None
        self._num_offloaded = self._last_block() if has_last else len(self._chunks)

    def _last_block(self) -> int:
        """Return the place of the last block among the chunks."""
        places = [place for place, chunk in enumerate(self._chunks) if is_block(self.plans[chunk.layers.start].name)]
        return places[-1] if places else 0

    def _through(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        """Return the stream after the layers between embedding and head."""
        if self._offload is None or not torch.is_grad_enabled():
            for chunk in self._chunks:
                stream = chunk(self._call, stream, cache)
            return stream
        forward = self._offload.start()
        for place, chunk in enumerate(self._chunks):
            travels = place < self._num_offloaded
            with self._offload.block(forward, stream.hidden.device) if travels else nullcontext():
                stream = chunk(self._call, stream, cache)
        return stream

    def _call(self, index: int, *inputs: Any) -> Any:
        module, call = self._in_order[index], self.plans[index].call
        return module(*inputs) if call is None else call(module, *inputs)
