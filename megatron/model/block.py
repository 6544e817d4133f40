"""A decoder layer: where the norms stand, how the parts are added, and where tensor-parallel ranks meet.

    PreNormBlock    a = x + drop(attention(n1(x)));  y = a + drop(mlp(n2(a)))               GPT-2
    ParallelBlock   y = x + drop(attention(n1(x))) + drop(mlp(n2(x)))                       GPT-J, GPT-NeoX-20B, Pythia

n2 is n1 itself where the norms are tied (gpt_j_tied).

What a layer adds last is a pass over memory of its own, unless the next norm adds it as it reads: then the layer leaves
it to that norm, as the branch of its stream. The sums are the same to the last bit.

A PreNormBlock enters the split layers and leaves them twice. A ParallelBlock does it once, around norms, attention and
MLP together: half the communication, for norms that each rank computes on the whole sequence. With hidden dropout,
which must see whole sums, the two branches leave one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from megatron.model.attention import SelfAttention
from megatron.model.cache import KVCache
from megatron.model.made_again import made_again
from megatron.model.mlp import MLP
from megatron.model.recompute import recomputed
from megatron.model.stream import Stream
from megatron.ops.choice import Function
from megatron.ops.dropout_add import add_dropped
from megatron.parallel.collectives import TensorRegion


class Block(nn.Module):
    """The parts of a decoder layer.

    post_attention_layernorm: n2, or None to use n1 for both.
    dropout: probability, on each branch before it is added. add_dropped: how it is, where there is dropout.
    region: where the split layers begin and end.
    recompute_norms: make what the norms return again in the backward pass.
    defers: leave the last addition to the norm that follows, where there is no dropout.
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
        recompute_norms: bool = False,
        defers: bool = False,
    ) -> None:
        super().__init__()
        self.recompute_norms = recompute_norms
        self.input_layernorm = input_layernorm
        self.attention = attention
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp
        self.dropout = dropout
        self.region = region
        self.add_dropped = add_dropped
        self.defers = defers

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _normed(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """Return norm(hidden), of which nothing but `hidden` is kept where norms are recomputed."""
        if self.recompute_norms and norm.is_composite:
            return recomputed(norm, hidden, draws=False)
        result: Tensor = norm(hidden)
        return result

    def _feeding(
        self, entered: Tensor, norm: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> AbstractContextManager[Any]:
        """Return the context of the branch that is fed `entered`, which is norm(hidden)."""
        return made_again(entered, norm, hidden) if self.recompute_norms else nullcontext()

    def _add(self, hidden: Tensor, branch: Tensor) -> Tensor:
        """Return hidden and what a branch adds to it, behind the split layers."""
        whole = self.region.leave(branch)
        if not self._drops:
            return hidden + whole
        with self.region.dropout_stream(hidden.device):
            dropped: Tensor = self.add_dropped(whole, None, hidden, self.dropout)
            return dropped

    def _first_normed(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Return the input norm of the residual stream, and that stream whole."""
        if self.recompute_norms and self.input_layernorm.is_composite:
            stream = stream.whole()
        if stream.branch is None:
            return self._normed(self.input_layernorm, stream.hidden), stream.hidden
        normed, hidden = self.input_layernorm(stream.branch, stream.hidden)
        return normed, hidden

    def _ended(self, stream: Stream, hidden: Tensor, branch: Tensor) -> Stream:
        """Return the stream after this layer, to which it adds `branch` last."""
        if self.defers and not self._drops:
            return stream.moved(hidden, self.region.leave(branch))
        return stream.moved(self._add(hidden, branch))


class PreNormBlock(Block):
    """Attention, then the MLP on its result, each with its norm."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        assert self.post_attention_layernorm is not None
        region = self.region
        normed, hidden = self._first_normed(stream)
        first = region.enter(normed)
        with self._feeding(first, self._first, hidden):
            attended = self.attention(first, stream.segments, cache)
        if self._drops or (self.recompute_norms and self.post_attention_layernorm.is_composite):
            hidden = self._add(hidden, attended)
            normed = self._normed(self.post_attention_layernorm, hidden)
        else:
            normed, hidden = self.post_attention_layernorm(region.leave(attended), hidden)
        second = region.enter(normed)
        with self._feeding(second, self._second, hidden):
            branch = self.mlp(second)
        return self._ended(stream, hidden, branch)

    def _first(self, hidden: Tensor) -> Tensor:
        return self.region.enter(self.input_layernorm(hidden))

    def _second(self, hidden: Tensor) -> Tensor:
        assert self.post_attention_layernorm is not None
        return self.region.enter(self.post_attention_layernorm(hidden))


class ParallelBlock(Block):
    """Attention and MLP on the same input; the norms stand inside the region (their ShardSpec says tensor_partial)."""

    def forward(self, stream: Stream, cache: KVCache | None = None) -> Stream:
        norms = self.input_layernorm, self.post_attention_layernorm or self.input_layernorm
        if self.region.is_split:  # what enters does so once, and whole
            stream = stream.whole()
            hidden, whole = stream.hidden, self.region.enter(stream.hidden)
            first = self._normed(norms[0], whole)
        else:
            first, hidden = self._first_normed(stream)
            whole = hidden
        second = first if norms[0] is norms[1] else self._normed(norms[1], whole)
        with self._feeding(first, norms[0], whole):
            attended = self.attention(first, stream.segments, cache)
        with self._feeding(second, norms[1], whole):
            branches = [attended, self.mlp(second)]
        if self.region.is_split and not self._drops:
            branches = [branches[0] + branches[1]]
        *others, last = branches
        for branch in others:
            hidden = self._add(hidden, branch)
        return self._ended(stream, hidden, last)
