"""The layer plans as one plain module: what ZeRO 0 to 3, generation and tests use.

    logits = model(tokens)                                     # [b, s] -> [b, s, v]
    losses = model(tokens, labels=labels)                      # [b, s] fp32, one per token
    total = model(tokens, labels=labels, loss_mask=mask)       # fp32 scalar: sum of the masked losses
    logits = model(tokens, cache=cache)                        # of the new tokens, with a KVCache

The third form is the one to train with: it finishes the head's gradients in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.model.cache import KVCache
from megatron.model.init import initialize
from megatron.model.plan import LayerPlan
from megatron.model.stream import Stream
from megatron.parallel.mesh import Axis

_BLOCK_PREFIX = "layers."
_SINGLE = Axis("tp")


class SequentialModel(nn.Module):
    """Builds the plans in order and runs them in order.

    device, dtype: of all parameters.
    seed: of the initial weights; None makes them zeros, for a checkpoint to fill.
    tensor_axis: the axis that the plans were made for; this rank takes its share of each initial tensor.
    recompute_layers: consecutive blocks whose activations are recomputed together in the backward pass; 0 keeps all.

    Parameters are named canonically: `named_parameters()` yields `<plan name>.<name in the module>`.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int | None = 1234,
        tensor_axis: Axis = _SINGLE,
        recompute_layers: int = 0,
    ) -> None:
        super().__init__()
        self.plans = tuple(plans)
        self._in_order = _build_modules(self, self.plans, torch.device(device), dtype, seed, tensor_axis)
        self._chunks = _chunks([plan.name for plan in self.plans], recompute_layers)

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
        for chunk, recomputed in self._chunks:
            if recomputed and torch.is_grad_enabled():
                stream = checkpoint(self._run, chunk, stream, cache, use_reentrant=False)
            else:
                stream = self._run(chunk, stream, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        output: Tensor = self._call(len(self.plans) - 1, stream, labels, loss_mask)
        return output

    def _run(self, chunk: range, stream: Stream, cache: KVCache | None) -> Stream:
        for index in chunk:
            stream = self._call(index, stream, cache)
        return stream

    def _call(self, index: int, *inputs: Any) -> Any:
        module, call = self._in_order[index], self.plans[index].call
        return module(*inputs) if call is None else call(module, *inputs)


def _build_modules(
    root: nn.Module,
    plans: Sequence[LayerPlan],
    device: torch.device,
    dtype: torch.dtype,
    seed: int | None,
    tensor_axis: Axis,
) -> list[nn.Module]:
    """Return the module of each plan, registered under `root` by name; plans that share get the same module."""
    modules: list[nn.Module] = []
    shared: dict[str, nn.Module] = {}
    for plan in plans:
        module = shared.get(plan.share or "")
        if module is None:
            with device, _default_dtype(dtype):
                module = plan.build()
            if seed is None:
                _clear(module)
            else:
                initialize(module, plan.name, seed, tensor_axis)
            _register(root, plan.name, module)
            if plan.share:
                shared[plan.share] = module
        modules.append(module)
    return modules


@torch.no_grad()
def _clear(module: nn.Module) -> None:
    """Set all weights to zero: memory that nobody wrote may hold NaN, which equals nothing, not even itself."""
    for parameter in module.parameters():
        parameter.zero_()


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add `module` below `root` at a dotted name; what lies between are plain containers."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


def _chunks(names: Sequence[str], recompute_layers: int) -> list[tuple[range, bool]]:
    """Return the indices between the first and the last plan in ranges, each with whether it is recomputed."""
    chunks: list[tuple[range, bool]] = []
    index, last = 1, len(names) - 1
    while index < last:
        end = index + 1
        recomputed = recompute_layers > 0 and names[index].startswith(_BLOCK_PREFIX)
        while recomputed and end < last and end - index < recompute_layers and names[end].startswith(_BLOCK_PREFIX):
            end += 1
        chunks.append((range(index, end), recomputed))
        index = end
    return chunks


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
