"""What flows between layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """hidden: [b, s, h] in the model's dtype.
    branch: what is still to be added to it, of the same shape, or None; the norm that comes next adds it as it reads.
    segments: [b, s] int64 document numbers, or None where every position of a row belongs to one document.
    auxiliary_loss: fp32 scalar that the objective adds, or None. There is never an s x s mask here.
    """

    hidden: Tensor
    segments: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    branch: Tensor | None = None

    def whole(self) -> Stream:
        """Return the stream with nothing left to add: what leaves a pipeline stage, or is kept for recomputation."""
        return self if self.branch is None else self.moved(self.hidden + self.branch)

    def moved(self, hidden: Tensor, branch: Tensor | None = None) -> Stream:
        """Return the stream with another hidden state, and what is to be added to that.

        Not by `_replace`, which torch.compile of PyTorch 2.11 traces to wrong fields.
        """
        return Stream(hidden, self.segments, self.auxiliary_loss, branch)
