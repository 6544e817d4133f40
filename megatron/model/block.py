"""A decoder layer: where the norms stand and how the parts are added.

    PreNormBlock    a = x + drop(attention(n1(x)));  y = a + drop(mlp(n2(a)))               GPT-2
    ParallelBlock   y = x + drop(attention(n1(x))) + drop(mlp(n2(x)))                       GPT-J, GPT-NeoX-20B, Pythia

n2 is n1 itself where the norms are tied (gpt_j_tied).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.attention import SelfAttention
from megatron.model.cache import KVCache
from megatron.model.mlp import MLP
from megatron.model.stream import Stream


class Block(nn.Module):
    """The parts of a decoder layer.

    post_attention_layernorm: n2, or None to use n1 for both.
    dropout: probability, on each branch before it is added.
    """

    def __init__(
        self,
        input_layernorm: nn.Module,
        attention: SelfAttention,
        post_attention_layernorm: nn.Module | None,
        mlp: MLP,
        dropout: float,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.attention = attention
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self.dropout = dropout

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


class PreNormBlock(Block):
    """Attention, then the MLP on its result, each with its norm."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        assert self.post_attention_layernorm is not None
        attended = self.attention(self.input_layernorm(stream.hidden), stream.segments, cache)
        hidden = stream.hidden + self._drop(attended)
        hidden = hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))
        return stream._replace(hidden=hidden)


class ParallelBlock(Block):
    """Attention and MLP on the same input."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        first = self.input_layernorm(stream.hidden)
        second = first if self.post_attention_layernorm is None else self.post_attention_layernorm(stream.hidden)
        attended = self._drop(self.attention(first, stream.segments, cache))
        return stream._replace(hidden=stream.hidden + attended + self._drop(self.mlp(second)))
