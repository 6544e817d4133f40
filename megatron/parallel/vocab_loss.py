"""Cross entropy where each tensor-parallel rank holds the logits of its share of the vocabulary.

    m = max over ranks of max(logits);   z = sum over ranks of sum(exp(logits - m));   loss = log z + m - logits[label]

Two numbers for each token go over the network in the one direction and two in the other; logits never do. The kernels
are those of `megatron.ops.cross_entropy`, which take what is below for the losses of a block of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.cross_entropy import BlockLosses, block_losses
from megatron.parallel.collectives import TensorRegion, all_maximum, all_sum


def vocabulary_losses(region: TensorRegion) -> BlockLosses:
    """Return the losses of logits [r, v/tp] and labels [r] in [0, v), as `linear_cross_entropy` takes them.

    All ranks compute the same losses; each computes the gradient of its own logits.
    """
    if not region.is_split:
        return block_losses

    def losses(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
        values = logits.float()
        local = labels.unsqueeze(1) - region.axis.rank * logits.shape[1]
        is_mine = (local >= 0) & (local < logits.shape[1])
        index = local.clamp(0, logits.shape[1] - 1)
        maximum = all_maximum(values.amax(dim=1, keepdim=True), region)
        shifted = torch.sub(values, maximum, out=values)
        target = shifted.gather(1, index) * is_mine
        weights = shifted.exp_()
        total, target = all_sum(torch.cat([weights.sum(dim=1, keepdim=True), target], dim=1), region).unbind(1)
        if scale is not None:
            gradient = weights.div_(total.unsqueeze(1)).scatter_add_(1, index, -is_mine.to(weights.dtype))
            logits.copy_(gradient if scale == 1.0 else gradient.mul_(scale))
        return total.log() - target

    return losses
