"""The two halves of a cross entropy over a share of the vocabulary, between which ranks add up what they hold.

    m = max over ranks of max(x);   z = sum over ranks of sum(exp(x - m));   loss = log z + m - x[label]
    d loss / d x = exp(x - m) / z - [column is label]

`logits_statistics` and `logits_gradient_` are the formulas of the halves, `share_losses` is both with what the ranks do
between them; `megatron.parallel.vocab_loss` knows the ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Meet = Callable[[Tensor], Tensor]
"""(maximum, sum, target logit) [3, r] of a share -> the same of the whole rows, on all ranks alike."""

ShareLosses = Callable[[Tensor, Tensor, float | None, int, Meet], Tensor]


def share_losses(logits: Tensor, labels: Tensor, scale: float | None, first: int, meet: Meet) -> Tensor:
    """Return the losses [r] fp32 of logits [r, v/tp] and labels [r] in [0, v), alike on all ranks.

    first: the vocabulary's index of the first column. With a scale, the logits become their own gradients times it;
    without, they are lost.
    """
    values = logits.float()
    index, is_mine = _local(labels, first, logits.shape[1])
    own = values.amax(dim=1)
    target = values.gather(1, index).squeeze(1) * is_mine
    weights = torch.sub(values, own.unsqueeze(1), out=values).exp_()
    maximum, total, target = meet(torch.stack((own, weights.sum(dim=1), target)))
    if scale is not None:
        gradient = weights.mul_(((own - maximum).exp() / total).unsqueeze(1))
        gradient.scatter_add_(1, index, -is_mine.to(gradient.dtype).unsqueeze(1))
        logits.copy_(gradient if scale == 1.0 else gradient.mul_(scale))
    return total.log() + (maximum - target)


def logits_statistics(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Return [3, r]: each row's maximum, its sum of exp(x - maximum), and its label's logit, 0 where another has it.

    logits [r, v/tp]: the vocabulary's columns from `first` on. labels [r]: of the whole vocabulary. At least fp32.
    """
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = values.amax(dim=1)
    total = (values - maximum.unsqueeze(1)).exp().sum(dim=1)
    index, is_mine = _local(labels, first, logits.shape[1])
    return torch.stack((maximum, total, values.gather(1, index).squeeze(1) * is_mine))


def logits_gradient_(logits: Tensor, labels: Tensor, first: int, maximum: Tensor, total: Tensor, scale: float) -> None:
    """Write the gradient times `scale` over the logits; maximum and total [r] are m and z."""
    index, is_mine = _local(labels, first, logits.shape[1])
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gradient = (values - maximum.unsqueeze(1)).exp() / total.unsqueeze(1)
    gradient.scatter_add_(1, index, -is_mine.to(gradient.dtype).unsqueeze(1))
    logits.copy_(gradient * scale)


def _local(labels: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return each label's column [r, 1], any where it is not among these, and whether it is [r]."""
    local = labels - first
    is_mine = (local >= 0) & (local < num_columns)
    return local.clamp(0, num_columns - 1).unsqueeze(1), is_mine
