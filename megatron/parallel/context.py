"""Context parallelism: which tokens of a sequence a rank computes, and how its attention sees the others.

On a context axis of C ranks a sequence is cut into 2C equal chunks, and rank r holds the chunks r and 2C-1-r, the
first half of its tokens and the second. Under a causal mask a token's work grows with its position, and such a pair of
chunks has the same work on every rank at every moment. Layers other than attention see tokens one by one and do not
notice; `local_positions` tells where each token stands, and is the one place that knows.

Two methods, since neither does everything:

    ring         Keys and values go from rank r to rank r+1, C-1 times, while the part at hand is computed; parts are
                 merged by their log-sum-exps (Liu et al. 2023, with the pairing of Brandon et al. 2023). It takes any
                 number of heads, so also grouped queries over few key-value heads, and holds the keys and values of
                 two ranks at a time. This is the default.
    all_to_all   Two exchanges turn shares of the sequence into shares of the heads and back (Jacobs et al. 2023), and
                 between them attention is that of one process: with dropout of its probabilities, and with learned
                 relative biases. It needs at least C key-value heads, and holds the whole sequence of its heads.

Bytes that each rank sends in one layer, for K = b k (s/C) d the elements of its keys (k heads), Q those of its queries,
and e bytes of an element:

    ring         forward (C-1) 2 K e       backward (C-1) (2 K e + 2 K 4), the gradients being sums in fp32
    all_to_all   forward (C-1)/C (2 Q + 2 K) e, and the same backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.ops.partial_attention import attend_part, attend_part_backward, merge_part
from megatron.parallel.mesh import Axis

_OPS = torch.ops._c10d_functional


def positions_of(rank: int, size: int, length: int, device: torch.device | str | None = None) -> Tensor:
    """Return the positions, in ascending order, of rank's tokens in a sequence of `length`: [length/size] int64.

    Raises ValueError where the sequence does not split into 2 * size chunks.
    """
    if size == 1:
        return torch.arange(length, device=device)
    chunk, rest = divmod(length, 2 * size)
    if rest:
        raise ValueError(f"{length} tokens do not split into 2 * {size} chunks (context_parallel_size)")
    inside = torch.arange(chunk, device=device)
    return torch.cat([inside + rank * chunk, inside + (2 * size - 1 - rank) * chunk])


def local_positions(axis: Axis, length: int, device: torch.device | str | None = None) -> Tensor:
    """Return the positions of this rank's tokens in a sequence of `length`: [length / axis.size] int64."""
    return positions_of(axis.rank, axis.size, length, device)


class Part(NamedTuple):
    """Queries of one rank and keys of one rank, as slices of their tokens, some pairs of which are visible.

    causal: some pairs have the key after the query. cut: some are further apart than the window.
    """

    query: slice
    key: slice
    causal: bool
    cut: bool


def visible_parts(query_rank: int, key_rank: int, size: int, half: int, window: int | None = None) -> list[Part]:
    """Return the parts that together hold every visible pair of two ranks' tokens once.

    half: tokens of a chunk; a rank has two. window: a token sees itself and the `window` tokens before it, or all.
    """
    first, second, both = slice(0, half), slice(half, 2 * half), slice(0, 2 * half)
    if window is None:
        if query_rank == key_rank:
            return [Part(both, both, causal=True, cut=False)]
        after = query_rank > key_rank
        return [Part(both, first, False, False) if after else Part(second, both, False, False)]
    parts = []
    for query, query_chunk in ((first, query_rank), (second, 2 * size - 1 - query_rank)):
        for key, key_chunk in ((first, key_rank), (second, 2 * size - 1 - key_rank)):
            nearest = (query_chunk - key_chunk) * half - (half - 1)
            furthest = (query_chunk - key_chunk) * half + (half - 1)
            if furthest >= 0 and nearest <= window:
                parts.append(Part(query, key, causal=nearest < 0, cut=furthest > window))
    return parts


@dataclass(frozen=True)
class Sight:
    """What tokens see: themselves and the tokens before them, within limits.

    scale: of the scores. window: tokens before oneself that are seen, or None for all.
    slopes: [n] alibi slopes, whose bias is -slope * distance, or None.
    segments: [b, s] document numbers of the whole sequence; only the own document is seen. Or None.
    """

    scale: float
    window: int | None = None
    slopes: Tensor | None = None
    segments: Tensor | None = None

    def needs_bias(self, part: Part) -> bool:
        """Return whether the part's `causal` does not say all of what its tokens see."""
        return part.cut or self.slopes is not None or self.segments is not None

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return what is added to the scores of queries and keys at these positions: [.., q, s] fp32, -inf hides."""
        distance = queries.unsqueeze(1) - keys.unsqueeze(0)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance <= self.window
        if self.segments is not None:
            same = self.segments[:, queries].unsqueeze(2) == self.segments[:, keys].unsqueeze(1)
            seen = (seen & same).unsqueeze(1)
        slopes = torch.zeros(1, device=queries.device) if self.slopes is None else self.slopes.to(queries.device)
        return (-slopes.float().view(-1, 1, 1) * distance).masked_fill(~seen, float("-inf"))


class Ring:
    """The way from each rank of an axis to the next."""

    def __init__(self, axis: Axis) -> None:
        self.rank, self.size = axis.rank, axis.size
        self.group = axis.group.group_name if axis.group is not None else ""

    def pass_on(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to send `tensor` to the next rank; the function returned waits for the previous rank's."""
        sent = [0] * self.size
        sent[(self.rank + 1) % self.size] = tensor.numel()
        received = [0] * self.size
        received[(self.rank - 1) % self.size] = tensor.numel()
        pending = _OPS.all_to_all_single(tensor.contiguous().view(-1), received, sent, self.group)
        return lambda: _OPS.wait_tensor(pending).view(tensor.shape)


def ring_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight, axis: Axis) -> Tensor:
    """Return [b, n, s/C, d] of this rank's queries over the whole sequence.

    query: [b, n, s/C, d]; key, value: [b, k, s/C, d]: this rank's tokens, in the order of `local_positions`.
    """
    result: Tensor = _RingAttention.apply(query, key, value, sight, Ring(axis))
    return result


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight, ring: Ring) -> Tensor:
        output, lse = ring_forward(query, key, value, sight, ring)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.sight, ctx.ring = sight, ring
        return output

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        found = ring_backward(gradient[0].contiguous(), query, key, value, output, lse, ctx.sight, ctx.ring)
        return (*found, None, None)


def ring_forward(query: Tensor, key: Tensor, value: Tensor, sight: Sight, ring: Ring) -> tuple[Tensor, Tensor]:
    """Return the output in the query's dtype, and the log-sum-exp [b, n, s/C] in fp32; nothing of it has gradients."""
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=torch.float32, device=query.device)
    pair = torch.stack((key, value))
    for step in range(ring.size):
        arriving = ring.pass_on(pair) if step + 1 < ring.size else None
        for rows, columns, mask in _masked_parts(ring, step, query, sight):
            keys, values = pair[:, :, :, columns]
            found = attend_part(query[:, :, rows], keys, values, sight.scale, **mask)
            merge_part(output[:, :, rows], lse[:, :, rows], *found)
        pair = arriving() if arriving is not None else pair
    return output.to(query.dtype), lse


def ring_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, sight: Sight, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    The sums for a rank's keys and values follow them around the ring from the first rank after their own, and come
    home with the last exchange.
    """
    of_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    of_own = torch.zeros((2, *key.shape), dtype=torch.float32, device=key.device)
    pair, earlier = torch.stack((key, value)), None
    for step in range(ring.size):
        arriving = ring.pass_on(pair) if step + 1 < ring.size else None
        of_pair = of_own if step == 0 else torch.zeros_like(of_own)
        for rows, columns, mask in _masked_parts(ring, step, query, sight):
            keys, values = pair[:, :, :, columns]
            of_rows, local, merged, local_lse = (each[:, :, rows] for each in (gradient, query, output, lse))
            found = attend_part_backward(of_rows, local, keys, values, merged, local_lse, sight.scale, **mask)
            of_query[:, :, rows] += found.query
            of_pair[0, :, :, columns] += found.key
            of_pair[1, :, :, columns] += found.value
        if step > 0:
            earlier = ring.pass_on(of_pair if earlier is None else of_pair + earlier())
        pair = arriving() if arriving is not None else pair
    if earlier is not None:
        of_own += earlier()
    return of_query.to(query.dtype), of_own[0].to(key.dtype), of_own[1].to(value.dtype)


def _masked_parts(ring: Ring, step: int, query: Tensor, sight: Sight) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Yield the parts of one step, each as slices of this rank's queries and the visiting keys, and its mask."""
    owner, local = (ring.rank - step) % ring.size, query.shape[2]
    for part in visible_parts(ring.rank, owner, ring.size, local // 2, sight.window):
        if not sight.needs_bias(part):
            yield part.query, part.key, {"causal": part.causal}
            continue
        queries, keys = (positions_of(rank, ring.size, local * ring.size, query.device) for rank in (ring.rank, owner))
        yield part.query, part.key, {"bias": sight.bias(queries[part.query], keys[part.key])}


def sequence_to_heads(tokens: Tensor, axis: Axis) -> Tensor:
    """Return this rank's share of the heads over the whole sequence, in its order: [b, n, s/C, d] -> [b, n/C, s, d].

    Raises ValueError where C does not divide the heads.
    """
    if tokens.shape[1] % axis.size:
        raise ValueError(f"{tokens.shape[1]} heads do not split over {axis.size} ranks (context_parallel_size)")
    result: Tensor = _SequenceToHeads.apply(tokens, axis)
    return result


def heads_to_sequence(heads: Tensor, axis: Axis) -> Tensor:
    """Return all heads of this rank's tokens: [b, n/C, s, d] -> [b, n, s/C, d]; the inverse of `sequence_to_heads`."""
    result: Tensor = _HeadsToSequence.apply(heads, axis)
    return result


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _to_heads(tokens, axis)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return _to_sequence(gradient[0], ctx.axis), None


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _to_sequence(heads, axis)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return _to_heads(gradient[0], ctx.axis), None


def _to_heads(tokens: Tensor, axis: Axis) -> Tensor:
    exchanged = _exchange(tokens.unflatten(1, (axis.size, -1)).movedim(1, 0), axis)
    by_rank = exchanged.movedim(0, 2).flatten(2, 3)
    return by_rank.index_select(2, _order(axis, by_rank.shape[2], tokens.device).argsort())


def _to_sequence(heads: Tensor, axis: Axis) -> Tensor:
    by_rank = heads.index_select(2, _order(axis, heads.shape[2], heads.device))
    return _exchange(by_rank.unflatten(2, (axis.size, -1)).movedim(2, 0), axis).movedim(0, 1).flatten(1, 2)


def _order(axis: Axis, length: int, device: torch.device) -> Tensor:
    """Return the positions of all ranks' tokens, rank by rank."""
    return torch.cat([positions_of(rank, axis.size, length, device) for rank in range(axis.size)])


def _exchange(shares: Tensor, axis: Axis) -> Tensor:
    """Give share i [C, ...] to rank i, and return what the ranks gave, in their order."""
    assert axis.group is not None
    sizes = [1] * axis.size
    pending = _OPS.all_to_all_single(shares.contiguous(), sizes, sizes, axis.group.group_name)
    received: Tensor = _OPS.wait_tensor(pending)
    return received
