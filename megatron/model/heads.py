"""The last layer: logits, or losses straight from the hidden states."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.stream import Stream
from megatron.ops.cross_entropy import BlockLosses, linear_cross_entropy, linear_cross_entropy_sum
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import Initializer, VocabParallelEmbedding, make_parameter
from megatron.parallel.sharding import ShardSpec


def vocabulary_output(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    region: TensorRegion,
    losses: BlockLosses,
) -> Tensor:
    """Return logits [b, s, v]; with labels each token's loss [b, s] fp32; with a loss_mask besides, the scalar
    sum(loss * loss_mask) in fp32. Losses never hold all logits.

    weight: this rank's rows [v/tp, h]. losses: of a block of logits, as `megatron.parallel.vocab_loss` makes them.
    All ranks return the same.
    """
    hidden = region.enter(hidden)
    if labels is None:
        return region.gather_features(F.linear(hidden, weight))
    if loss_mask is None:
        return linear_cross_entropy(hidden, weight, labels, losses)
    return linear_cross_entropy_sum(hidden, weight, labels, loss_mask, losses)


class LanguageHead(nn.Module):
    """The projection [v, h] onto the vocabulary, without bias. losses: see `vocabulary_output`."""

    def __init__(
        self,
        num_tokens: int,
        hidden_size: int,
        region: TensorRegion,
        initializer: Initializer,
        losses: BlockLosses,
    ) -> None:
        super().__init__()
        self.region = region
        self.losses = losses
        self.weight = make_parameter((num_tokens, hidden_size), ShardSpec(dim=0), region.axis, initializer)

    def forward(self, stream: Stream, labels: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        return vocabulary_output(stream.hidden, self.weight, labels, loss_mask, self.region, self.losses)


class TiedEmbedding(VocabParallelEmbedding):
    """One table for both ends: tokens [b, s] -> hidden [b, s, h], and a Stream -> what LanguageHead returns.

    Both uses go through `forward`, so that hooks on the module (ZeRO-3 gathers weights in one) see both.
    losses: see `vocabulary_output`.
    """

    def __init__(
        self,
        num_tokens: int,
        hidden_size: int,
        region: TensorRegion,
        initializer: Initializer,
        losses: BlockLosses,
    ) -> None:
        super().__init__(num_tokens, hidden_size, region, initializer)
        self.losses = losses

    def forward(self, inputs: Tensor | Stream, labels: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        if isinstance(inputs, Stream):
            return vocabulary_output(inputs.hidden, self.weight, labels, loss_mask, self.region, self.losses)
        return super().forward(inputs)
