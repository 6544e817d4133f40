"""Tensors in memory as what engines load from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.sharding import StateRequest, split


@dataclass(frozen=True)
class Tensors:
    """A source of (name, kind) -> full tensor."""

    state: Mapping[tuple[str, str], Tensor]

    def shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        tensor = self.state.get((name, kind))
        return None if tensor is None else tuple(tensor.shape)

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self.state[name, kind].dtype

    def fill(self, requests: Sequence[StateRequest]) -> None:
        for request in requests:
            rank, size = request.shard
            share = split(self.state[request.name, request.kind], request.spec, size, rank)
            request.target.copy_(share.reshape(-1).narrow(0, request.start, request.target.numel()))
