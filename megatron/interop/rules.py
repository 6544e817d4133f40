"""How one weight looks here and in a Hugging Face file: one rule, both directions.

A family's table is a list of rules; export applies `to_hf`, import `from_hf`, and because it is the same table the
round trip is bit-equal. Names hold `{i}` for the layer. Shapes: n heads, k key-value heads, d head dim, h hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class Rule(ABC):
    """ours, theirs: names of the tensors on both sides, in the order in which the functions take and return them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    @abstractmethod
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return their tensors from ours."""

    @abstractmethod
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return our tensors from theirs."""


@dataclass(frozen=True)
class Same(Rule):
    """The same tensor under another name."""

    @override
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    @override
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)


@dataclass(frozen=True)
class Transposed(Rule):
    """[out, in] here, [in, out] there, as in GPT-2's Conv1D."""

    @override
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t() for tensor in tensors]

    @override
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t() for tensor in tensors]


@dataclass(frozen=True)
class SplitQKV(Rule):
    """Rows by group here (n/k query heads, key, value); there q [n d, ...], k [k d, ...] and v [k d, ...] apart."""

    num_heads: int
    num_kv_heads: int

    @override
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (fused,) = tensors
        group = self.num_heads // self.num_kv_heads
        head_dim = fused.shape[0] // (self.num_heads + 2 * self.num_kv_heads)
        grouped = fused.reshape(self.num_kv_heads, group + 2, head_dim, *fused.shape[1:])
        parts = (grouped[:, :group], grouped[:, group], grouped[:, group + 1])
        return [part.reshape(-1, *fused.shape[1:]) for part in parts]

    @override
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = tensors
        head_dim = query.shape[0] // self.num_heads
        shape = (self.num_kv_heads, -1, head_dim, *query.shape[1:])
        grouped = torch.cat([part.reshape(shape) for part in (query, key, value)], dim=1)
        return [grouped.reshape(-1, *query.shape[1:])]


@dataclass(frozen=True)
class StackedQKV(Rule):
    """Rows by group here; there one tensor of all q, then all k, then all v, [in, out] where `transposed`."""

    num_heads: int
    num_kv_heads: int
    transposed: bool

    @override
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        stacked = torch.cat(self._split().to_hf(tensors))
        return [stacked.t() if self.transposed else stacked]

    @override
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (stacked,) = tensors
        stacked = stacked.t() if self.transposed else stacked
        head_dim = stacked.shape[0] // (self.num_heads + 2 * self.num_kv_heads)
        sizes = [count * head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        return self._split().from_hf(stacked.split(sizes))

    def _split(self) -> SplitQKV:
        return SplitQKV(self.ours, self.theirs, self.num_heads, self.num_kv_heads)


@dataclass(frozen=True)
class Halves(Rule):
    """The two halves of a gated linear1 here; two tensors there: first the value ("up"), then the gate."""

    @override
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (both,) = tensors
        return list(both.chunk(2))

    @override
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors))]


@dataclass(frozen=True)
class Zeros(Rule):
    """A bias that this model does not have and the Hugging Face class always has."""

    shape: tuple[int, ...]

    @override
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros(self.shape) for _ in self.theirs]

    @override
    def from_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return []


def same(ours: str, theirs: str) -> Same:
    """Return the rule of one tensor that is the same on both sides."""
    return Same((ours,), (theirs,))


def per_layer(rules: Iterable[Rule], num_layers: int) -> list[Rule]:
    """Return the rules of every layer, with `{i}` in their names replaced by its number."""
    templates = list(rules)
    return [_numbered(rule, layer) for layer in range(num_layers) for rule in templates]


def _numbered(rule: Rule, layer: int) -> Rule:
    ours, theirs = (tuple(name.format(i=layer) for name in names) for names in (rule.ours, rule.theirs))
    return replace(rule, ours=ours, theirs=theirs)
