"""The layer plans as one plain module: what ZeRO 0 to 3, generation and tests use.

    logits = model(tokens)                                     # [b, s] -> [b, s, v]
    losses = model(tokens, labels=labels)                      # [b, s] fp32, one per token
    total = model(tokens, labels=labels, loss_mask=mask)       # fp32 scalar: sum of the masked losses
    logits = model(tokens, cache=cache)                        # of the new tokens, with a KVCache

The third form is the one to train with: it finishes the head's gradients in the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.assemble import build_modules, fill, full_shapes
from megatron.model.cache import KVCache
from megatron.model.plan import LayerPlan
from megatron.model.recompute import Recompute
from megatron.model.stream import Stream
from megatron.parallel.mesh import Axis

_SINGLE = Axis("tp")


class SequentialModel(nn.Module):
    """Builds the plans in order and runs them in order.

    device, dtype: of all parameters.
    seed: of the initial weights; None makes them zeros, for a checkpoint to fill.
    tensor_axis: the axis that the plans were made for; this rank takes its share of each initial tensor. The ranks of
        the axis call the model together and all get the same result, whole.
    recompute: which activations are computed again in the backward pass; None keeps all.

    Parameters are named canonically: `named_parameters()` yields `<plan name>.<name in the module>`.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int | None = 1234,
        tensor_axis: Axis = _SINGLE,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        self.plans = tuple(plans)
        self._in_order = build_modules(self, self.plans, device, dtype)
        fill(self, seed, tensor_axis)
        self.tensor_size = tensor_axis.size
        names = [plan.name for plan in self.plans]
        self._chunks = (recompute or Recompute()).chunks(names, range(1, len(names) - 1))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits, losses or their sum, as the module's docstring lists.

        tokens, labels [b, s] int64; loss_mask [b, s] fp32; segments [b, s] int64 document numbers: a token attends to
        its own document only; cache: the tokens follow those that it holds.
        """
        stream: Stream = self._call(0, tokens, segments)
        for chunk in self._chunks:
            stream = chunk(self._call, stream, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        output: Tensor = self._call(len(self.plans) - 1, stream, labels, loss_mask)
        return output

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every weight, by canonical name."""
        return full_shapes(self, self.tensor_size)

    def _call(self, index: int, *inputs: Any) -> Any:
        module, call = self._in_order[index], self.plans[index].call
        return module(*inputs) if call is None else call(module, *inputs)
