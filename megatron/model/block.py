"""A decoder layer: where the norms stand, how the parts are added, and where tensor-parallel ranks meet.

    PreNormBlock    a = x + drop(attention(n1(x)));  y = a + drop(mlp(n2(a)))               GPT-2
    ParallelBlock   y = x + drop(attention(n1(x))) + drop(mlp(n2(x)))                       GPT-J, GPT-NeoX-20B, Pythia

n2 is n1 itself where the norms are tied (gpt_j_tied).

A PreNormBlock enters the split layers and leaves them twice. A ParallelBlock does it once, around norms, attention and
MLP together: half the communication, for norms that each rank computes on the whole sequence. With hidden dropout,
which must see whole sums, the two branches leave one by one.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.model.attention import SelfAttention
from megatron.model.cache import KVCache
from megatron.model.mlp import MLP
from megatron.model.stream import Stream
from megatron.parallel.collectives import TensorRegion


class Block(nn.Module):
    """The parts of a decoder layer.

    post_attention_layernorm: n2, or None to use n1 for both.
    dropout: probability, on each branch before it is added.
    region: where the split layers begin and end.
    """

    def __init__(
        self,
        input_layernorm: nn.Module,
        attention: SelfAttention,
        post_attention_layernorm: nn.Module | None,
        mlp: MLP,
        dropout: float,
        region: TensorRegion,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.attention = attention
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self.dropout = dropout
        self.region = region

    def _leave(self, branch: Tensor) -> Tensor:
        return self.region.dropout(self.region.leave(branch), self.dropout, self.training)


class PreNormBlock(Block):
    """Attention, then the MLP on its result, each with its norm."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        assert self.post_attention_layernorm is not None
        region = self.region
        attended = self.attention(region.enter(self.input_layernorm(stream.hidden)), stream.segments, cache)
        hidden = stream.hidden + self._leave(attended)
        hidden = hidden + self._leave(self.mlp(region.enter(self.post_attention_layernorm(hidden))))
        return stream._replace(hidden=hidden)


class ParallelBlock(Block):
    """Attention and MLP on the same input; the norms stand inside the region (their ShardSpec says tensor_partial)."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        whole = self.region.enter(stream.hidden)
        first = self.input_layernorm(whole)
        second = first if self.post_attention_layernorm is None else self.post_attention_layernorm(whole)
        branches = [self.attention(first, stream.segments, cache), self.mlp(second)]
        if self.region.is_split and not (self.training and self.dropout):
            branches = [branches[0] + branches[1]]
        hidden = stream.hidden
        for branch in branches:
            hidden = hidden + self._leave(branch)
        return stream._replace(hidden=hidden)
