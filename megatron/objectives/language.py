"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron.data.batch import Batch


def language_loss(model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (sum of the losses of the trained tokens in nats, fp32 scalar; number of trained tokens, fp32 scalar).

    Both are sums, so that the caller can normalise by the trained tokens of a whole step, over all micro-batches and
    ranks.
    """
    total: Tensor = model(batch.tokens, labels=batch.labels, loss_mask=batch.loss_mask, segments=batch.segments)
    return total, batch.loss_mask.sum()
