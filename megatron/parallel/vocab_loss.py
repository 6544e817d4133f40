"""Cross entropy where each tensor-parallel rank holds the logits of its share of the vocabulary.

    m = max over ranks of max(logits);   z = sum over ranks of sum(exp(logits - m));   loss = log z + m - logits[label]

One number for each token goes over the network for the maximum and two for the sums; logits never do. What computes
them is `megatron.ops.cross_entropy`, which takes what is below for the losses of a block of logits, and
`megatron.ops.logits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.cross_entropy import BlockLosses, block_losses
from megatron.ops.logits import ShareLosses, share_losses
from megatron.parallel.collectives import TensorRegion, all_maximum, all_sum


def vocabulary_losses(
    region: TensorRegion, whole: BlockLosses = block_losses, share: ShareLosses = share_losses
) -> BlockLosses:
    """Return the losses of logits [r, v/tp] and labels [r] in [0, v), as `linear_cross_entropy` takes them.

    All ranks compute the same losses; each computes the gradient of its own logits.
    whole, share: what computes them where a rank has all of the vocabulary, and where it has a share.
    """
    if not region.is_split:
        return whole

    def meet(statistics: Tensor) -> Tensor:
        own, total, target = statistics
        maximum = all_maximum(own, region)
        sums = all_sum(torch.stack((total * (own - maximum).exp(), target)), region)
        return torch.cat((maximum.unsqueeze(0), sums))

    def losses(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
        return share(logits, labels, scale, region.axis.rank * logits.shape[1], meet)

    return losses
