"""One micro-batch of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
