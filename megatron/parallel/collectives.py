"""How the shares of a layer meet: collectives over the tensor axis, in pairs that are each other's gradient.

    forward                                  gradient                            where
    copy (nothing)                           sum over ranks                      before a column-parallel layer
    sum over ranks                           copy (nothing)                      after a row-parallel layer
    gather of the sequence                   sum, scattered over the sequence    before, under sequence parallelism
    sum, scattered over the sequence         gather of the sequence              after, under sequence parallelism
    gather of the last dim                   this rank's share                   logits that somebody wants to see
    sum over ranks                           sum over ranks                      statistics that all ranks go on with

Between `enter` and `leave` each rank computes a share of the features (or heads) of the whole sequence, and its
gradients of what entered are partial. Everything calls the functional collectives, which torch.compile traces.
On an axis of size 1 nothing is called at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.parallel.mesh import Axis
from megatron.parallel.rng import forked_stream

_OPS = torch.ops._c10d_functional


@dataclass(frozen=True)
class TensorRegion:
    """What the layers that are split over the tensor axis know of each other.

    axis: the tensor axis.
    sequence: sequence parallelism (Korthikanti et al. 2022): outside of the split layers each rank holds the tokens of
        its share of the sequence, hidden [b, s/tp, h].
    fp32: 16 bit values are summed, and sent, in fp32 (fp32_allreduce).
    group: name of the axis's process group, by which torch.compile knows it.
    """

    axis: Axis
    sequence: bool = False
    fp32: bool = False
    group: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.axis.group is not None:
            object.__setattr__(self, "group", self.axis.group.group_name)

    @property
    def is_split(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.axis.size > 1

    @property
    def splits_sequence(self) -> bool:
        """Whether hidden states outside of split layers are [b, s/tp, h]."""
        return self.sequence and self.is_split

    def enter(self, hidden: Tensor) -> Tensor:
        """Return hidden [b, s, h], whole on each rank, from [b, s, h] or, under sequence parallelism, [b, s/tp, h]."""
        if not self.is_split:
            return hidden
        result: Tensor = _GatherSequence.apply(hidden, self) if self.sequence else _Copy.apply(hidden, self)
        return result

    def leave(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks of [b, s, h]: all of it, or under sequence parallelism this rank's tokens."""
        if not self.is_split:
            return partial
        result: Tensor = _ScatterSum.apply(partial, self) if self.sequence else _Sum.apply(partial, self)
        return result

    def gather_features(self, share: Tensor) -> Tensor:
        """Return all ranks' shares of the last dim [..., n], in order, from this rank's [..., n/tp]."""
        result: Tensor = _GatherFeatures.apply(share, self) if self.is_split else share
        return result

    def sum_for_all(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks of something small with which every rank goes on in its own share."""
        result: Tensor = _SumForAll.apply(partial, self) if self.is_split else partial
        return result

    def once(self, bias: Tensor) -> Tensor:
        """Return bias / tp, for a sum over ranks that shall hold the bias once; its gradient is the whole bias's."""
        result: Tensor = _Once.apply(bias, self) if self.is_split else bias
        return result

    def tokens(self, per_token: Tensor) -> Tensor:
        """Return what belongs to this rank's tokens outside of split layers: a share of the last dim, or all of it."""
        return per_token.chunk(self.axis.size, dim=-1)[self.axis.rank] if self.splits_sequence else per_token

    def dropout(self, hidden: Tensor, probability: float, training: bool) -> Tensor:
        """Drop elements of hidden states outside of split layers: alike on all ranks where they are replicated,
        independently where each rank holds tokens of its own."""
        if not (training and probability):
            return hidden
        with self.dropout_stream(hidden.device):
            return F.dropout(hidden, probability)

    @contextmanager
    def dropout_stream(self, device: torch.device) -> Iterator[None]:
        """Draw what drops hidden states outside of split layers inside: alike on all ranks where they are replicated,
        independently where each rank holds tokens of its own."""
        if not self.splits_sequence:
            yield
            return
        with self.own_stream(device):
            yield

    @contextmanager
    def own_stream(self, device: torch.device) -> Iterator[None]:
        """Draw this rank's own random numbers inside; outside, all ranks go on drawing alike."""
        if not self.is_split:
            yield
            return
        with forked_stream(self.axis.rank, device):
            yield


def all_sum(values: Tensor, region: TensorRegion) -> Tensor:
    """Return the sum over the tensor axis, a new tensor without gradient."""
    wide = values.float() if region.fp32 and values.dtype.itemsize == 2 else values
    total: Tensor = _OPS.wait_tensor(_OPS.all_reduce(wide.contiguous(), "sum", region.group))
    return _as(total, values.dtype)


def all_maximum(values: Tensor, region: TensorRegion) -> Tensor:
    """Return the maximum over the tensor axis, a new tensor without gradient."""
    result: Tensor = _OPS.wait_tensor(_OPS.all_reduce(values.contiguous(), "max", region.group))
    return result


def _gather(share: Tensor, region: TensorRegion, dim: int) -> Tensor:
    """Return the shares of all ranks, in order, along `dim`."""
    size = region.axis.size
    stacked = _OPS.wait_tensor(_OPS.all_gather_into_tensor(share.contiguous(), size, region.group))
    if dim == 0:
        return stacked
    return stacked.unflatten(0, (size, share.shape[0])).movedim(0, dim).flatten(dim, dim + 1)


def _scatter_sum(partial: Tensor, region: TensorRegion) -> Tensor:
    """Return this rank's share, along dim 1, of the sum over ranks."""
    size = region.axis.size
    wide = partial.float() if region.fp32 and partial.dtype.itemsize == 2 else partial
    if wide.shape[1] % size:
        raise ValueError(f"{wide.shape[1]} tokens do not split over {size} ranks (sequence_parallel)")
    stacked = wide.unflatten(1, (size, wide.shape[1] // size)).movedim(1, 0).flatten(0, 1).contiguous()
    share = _OPS.wait_tensor(_OPS.reduce_scatter_tensor(stacked, "sum", size, region.group))
    return _as(share, partial.dtype)


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in a dtype. Where they are that already nothing may be called: of a conversion that returns the
    tensor itself, at the end of an autograd function, torch.compile of PyTorch 2.11 makes a gradient of zeros."""
    return values if values.dtype == dtype else values.to(dtype)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, region: TensorRegion) -> Tensor:
        ctx.region = region
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return all_sum(gradient[0], ctx.region), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, region: TensorRegion) -> Tensor:
        return all_sum(partial, region)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, region: TensorRegion) -> Tensor:
        ctx.region = region
        return _gather(share, region, 1)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(gradient[0], ctx.region), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, region: TensorRegion) -> Tensor:
        ctx.region = region
        return _scatter_sum(partial, region)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient[0], ctx.region, 1), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, region: TensorRegion) -> Tensor:
        ctx.region = region
        return _gather(share, region, share.dim() - 1)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        axis = ctx.region.axis
        return gradient[0].chunk(axis.size, dim=-1)[axis.rank], None


class _SumForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, region: TensorRegion) -> Tensor:
        ctx.region = region
        return all_sum(partial, region)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return all_sum(gradient[0], ctx.region), None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, region: TensorRegion) -> Tensor:
        return bias / region.axis.size

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None
