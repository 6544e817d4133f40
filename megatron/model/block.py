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
from megatron.ops.choice import Function
from megatron.ops.dropout_add import add_dropped
from megatron.parallel.collectives import TensorRegion


class Block(nn.Module):
    """The parts of a decoder layer.

    post_attention_layernorm: n2, or None to use n1 for both.
    dropout: probability, on each branch before it is added. add_dropped: how it is, where there is dropout.
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
        add_dropped: Function = add_dropped,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.attention = attention
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self.dropout = dropout
        self.region = region
        self.add_dropped = add_dropped

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _add(self, hidden: Tensor, branch: Tensor) -> Tensor:
        """Return hidden and what a branch adds to it, behind the split layers."""
        whole = self.region.leave(branch)
        if not self._drops:
            return hidden + whole
        with self.region.dropout_stream(hidden.device):
            dropped: Tensor = self.add_dropped(whole, None, hidden, self.dropout)
            return dropped


class PreNormBlock(Block):
    """Attention, then the MLP on its result, each with its norm."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        assert self.post_attention_layernorm is not None
        region = self.region
        attended = self.attention(region.enter(self.input_layernorm(stream.hidden)), stream.segments, cache)
        if self._drops:
            hidden = self._add(stream.hidden, attended)
            normed = self.post_attention_layernorm(hidden)
        else:
            normed, hidden = self.post_attention_layernorm(region.leave(attended), stream.hidden)
        return stream._replace(hidden=self._add(hidden, self.mlp(region.enter(normed))))


class ParallelBlock(Block):
    """Attention and MLP on the same input; the norms stand inside the region (their ShardSpec says tensor_partial)."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        whole = self.region.enter(stream.hidden)
        first = self.input_layernorm(whole)
        second = first if self.post_attention_layernorm is None else self.post_attention_layernorm(whole)
        branches = [self.attention(first, stream.segments, cache), self.mlp(second)]
        if self.region.is_split and not self._drops:
            branches = [branches[0] + branches[1]]
        hidden = stream.hidden
        for branch in branches:
            hidden = self._add(hidden, branch)
        return stream._replace(hidden=hidden)
