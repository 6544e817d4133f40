"""One micro-batch of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.parallel.context import local_positions
from megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class Batch:
    """tokens, labels: [b, s] int64; labels[i, j] is the token that follows tokens[i, j].
    loss_mask: [b, s] fp32, 1 where the label is trained on and 0 where it is not.
    segments: [b, s] int64 document numbers within a row, or None where attention ignores documents.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    segments: Tensor | None = None

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch on `device`; copies from pinned memory do not block."""
        segments = None if self.segments is None else self.segments.to(device, non_blocking=True)
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            segments=segments,
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Say that `stream` uses the batch, so that its memory is not given away before that is over."""
        for tensor in (self.tokens, self.labels, self.loss_mask, self.segments):
            if tensor is not None:
                tensor.record_stream(stream)


def shard_sequence(batch: Batch, axis: Axis) -> Batch:
    """Return the tokens, labels and mask that this rank of the context axis computes, each [b, s / axis.size].

    Their order is that of `parallel.context.local_positions`. Labels follow the tokens of the whole sequence, so that
    none is lost where it is cut. segments stay whole, [b, s]: tokens compare theirs with those of all others.
    Raises ValueError where the sequence does not split.
    """
    if axis.size == 1:
        return batch
    mine = local_positions(axis, batch.tokens.shape[1], batch.tokens.device)
    tokens, labels, loss_mask = (each[:, mine] for each in (batch.tokens, batch.labels, batch.loss_mask))
    return replace(batch, tokens=tokens, labels=labels, loss_mask=loss_mask)
