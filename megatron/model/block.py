"""A decoder layer: where the norms stand and how the parts are added.

PreNormBlock    a = x + drop(attention(n1(x)));  y = a + drop(mlp(n2(a)))                 GPT-2
ParallelBlock   y = x + drop(attention(n1(x))) + drop(mlp(n2(x)))                         GPT-J, GPT-NeoX-20B, Pythia
                with n2 = n1 where the norms are tied (gpt_j_tied)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.attention import SelfAttention
from megatron.model.cache import KVCache
from megatron.model.mlp import MLP
from megatron.model.stream import Stream


class PreNormBlock(nn.Module):
    """Attention, then the MLP on its result. dropout: probability on each branch before it is added."""

    def __init__(
        self,
        input_layernorm: nn.Module,
        attention: SelfAttention,
        post_attention_layernorm: nn.Module,
        mlp: MLP,
        dropout: float,
    ) -> None:
        super().__init__()
        self.input_layernorm = input_layernorm
        self.attention = attention
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self.dropout = dropout

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        attended = self.attention(self.input_layernorm(stream.hidden), stream.segments, cache)
        hidden = stream.hidden + self._drop(attended)
        hidden = hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))
        return stream._replace(hidden=hidden)

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


class ParallelBlock(nn.Module):
    """Attention and MLP on the same input. post_attention_layernorm: the MLP's own norm, or None to share the first."""

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

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        first = self.input_layernorm(stream.hidden)
        second = first if self.post_attention_layernorm is None else self.post_attention_layernorm(stream.hidden)
        attended = self._drop(self.attention(first, stream.segments, cache))
        return stream._replace(hidden=stream.hidden + attended + self._drop(self.mlp(second)))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch
