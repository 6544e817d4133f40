"""Results that are made again in the backward pass, where whoever uses them would have kept them.

A linear map keeps its input for the gradient of its weights. Where that input costs little to make (a norm, an
activation), the map is given it within `made_again`, and keeps how it is made instead:

    normed = norm(hidden)
    with made_again(normed, norm, hidden):
        wide = linear(normed)                # in its backward pass the linear map sees norm(hidden) anew

Only what makes the result runs twice, never what uses it. Compiled code decides by itself what to compute twice, so
that nothing happens there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


def made_again(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> AbstractContextManager[Any]:
    """Return the context in which nobody keeps `result`, which is make(*inputs): bit by bit the same at any time.

    The inputs are kept; views of the result are recognised. Hooks that are set around it see all else.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack, unpack = outer if outer is not None else (_same, _same)
    recipe = _Recipe(make, inputs, pack, unpack)
    place = result.untyped_storage().data_ptr()

    def keep(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() == place and tensor.dtype == result.dtype:
            return _View(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return _Kept(pack(tensor))

    def give(held: Any) -> Tensor:
        return held.tensor() if isinstance(held, _View) else unpack(held.packed)

    return saved_tensors_hooks(keep, give)


def _same(tensor: Any) -> Any:
    return tensor


class _Recipe:
    """How a result is made. inputs: as the hooks around would keep them."""

    def __init__(self, make: Callable[..., Tensor], inputs: tuple[Tensor, ...], pack: Pack, unpack: Unpack) -> None:
        self._make = make
        self._inputs = [pack(tensor.detach()) for tensor in inputs]
        self._unpack = unpack

    def result(self) -> Tensor:
        with torch.no_grad():
            return self._make(*(self._unpack(held) for held in self._inputs))


class _View:
    """A tensor that looks into a result."""

    def __init__(self, recipe: _Recipe, shape: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self._recipe = recipe
        self._place = shape, stride, offset

    def tensor(self) -> Tensor:
        return self._recipe.result().as_strided(*self._place)


class _Kept:
    """Any other tensor, as the hooks around keep it."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
