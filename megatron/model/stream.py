"""What flows between layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """hidden: [b, s, h] in the model's dtype.
    segments: [b, s] int64 document numbers, or None where every position of a row belongs to one document.
    auxiliary_loss: fp32 scalar that the objective adds, or None. There is never an s x s mask here.
    """

    hidden: Tensor
    segments: Tensor | None = None
    auxiliary_loss: Tensor | None = None
