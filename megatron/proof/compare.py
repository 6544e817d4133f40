"""Two traces compared: what differs by more than rounding, and where.

A number is measured relative to itself; a gradient by the norm of its difference, relative to its own norm and
to a hundredth of the whole gradient's, because some gradients are nothing but rounding (a key's bias).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.sharding import ShardSpec
from megatron.proof.trace import Gradient, Trace

ALLOWED = {"fp32": (1e-5, 1e-5), "bf16": (1e-2, 5e-2), "fp16": (2e-3, 1e-2), "fp8": (2e-2, 3e-1)}
"""Largest relative difference of numbers and of gradients, by precision: fp32 sums in another order, and 16 bits round
in other places as well. In fp8 a share of a tensor has a scale of its own, and so other roundings to 3 or 4 bits."""

_PART_OF_WHOLE = 1e-2
# Adam divides by the size of the gradient, so an update makes a large difference of a small rounding.
_AFTER_UPDATES = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One quantity of one step.

    ours, theirs: numbers, or norms of tensors. error: relative; nan is never allowed. where: of the largest difference.
    """

    name: str
    step: int
    ours: float
    theirs: float
    error: float
    allowed: float
    where: str = ""
    is_gradient: bool = False

    @property
    def passes(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.error <= self.allowed


def compare(ours: Trace, theirs: Trace, precision: str, tensor_size: int) -> list[Comparison]:
    """Return every comparison: numbers first, then the gradients of each step in the order of the layers.

    theirs: of one process. tensor_size: of the tensor axis, to say whose share a difference lies in.
    """
    of_numbers, of_gradients = ALLOWED[precision]
    return [*_numbers(ours, theirs, of_numbers), *_gradients(ours, theirs, of_gradients, tensor_size)]


def _numbers(ours: Trace, theirs: Trace, allowed: float) -> Iterator[Comparison]:
    rows = (("loss", ours.losses, theirs.losses), ("gradient norm", ours.norms, theirs.norms),
            ("norm after clipping", ours.clipped, theirs.clipped))  # fmt: skip
    for name, mine, other in rows:
        for step, (a, b) in enumerate(zip(mine, other, strict=True), start=1):
            yield Comparison(name, step, a, b, abs(a - b) / max(abs(b), 1e-30), allowed)


def _gradients(ours: Trace, theirs: Trace, allowed: float, tensor_size: int) -> Iterator[Comparison]:
    for step, (mine, other) in enumerate(zip(ours.gradients, theirs.gradients, strict=True), start=1):
        limit = allowed if step == 1 else max(allowed, _AFTER_UPDATES)
        whole = math.hypot(*(float(gradient.full.norm()) for gradient in other.values()))
        for name in [*other, *(name for name in mine if name not in other)]:
            yield _gradient(name, step, mine.get(name), other.get(name), whole, limit, tensor_size)


def _gradient(
    name: str, step: int, mine: Gradient | None, other: Gradient | None, whole: float, allowed: float, tensor_size: int
) -> Comparison:
    title = f"gradient of {name}"
    if mine is None or other is None or mine.full.shape != other.full.shape:
        found = [None if each is None else tuple(each.full.shape) for each in (mine, other)]
        return Comparison(title, step, 0.0, 0.0, float("inf"), allowed, f"shapes {found[0]} and {found[1]}", True)
    difference = mine.full - other.full
    norms = [float(tensor.norm()) for tensor in (mine.full, other.full, difference)]
    error = norms[2] / (norms[1] + _PART_OF_WHOLE * whole)
    return Comparison(title, step, norms[0], norms[1], error, allowed, _place(difference, mine, tensor_size), True)


def _place(difference: Tensor, gradient: Gradient, tensor_size: int) -> str:
    """Return the index of the largest difference, and which stage and tensor parallel rank hold it."""
    worst = torch.nan_to_num(difference.abs(), nan=float("inf")).argmax()
    index = [int(each) for each in torch.unravel_index(worst, difference.shape)]
    owner = _owner(index, difference.shape, gradient.spec, tensor_size)
    share = "" if owner is None else f", tensor rank {owner}"
    return f"most at {index}, stage {gradient.stage}{share}"


def _owner(index: list[int], shape: torch.Size, spec: ShardSpec, size: int) -> int | None:
    """Return the tensor rank whose share holds an element, or None where all hold it."""
    if spec.dim is None or size == 1:
        return None
    block = shape[spec.dim] // spec.blocks
    return index[spec.dim] % block // (block // size)
