"""Context parallelism: which tokens of a sequence a rank computes, and how its attention sees the others.

On a context axis of C ranks a sequence is cut into 2C equal chunks, and rank r holds the chunks r and 2C-1-r, the
first half of its tokens and the second. Under a causal mask a token's work grows with its position, and such a pair of
chunks has the same work on every rank at every moment. Layers other than attention see tokens one by one and do not
notice; `local_positions` tells where each token stands, and is the one place that knows.

Two methods, since neither does everything:

    ring         Keys and values go from rank r to rank r+1, C-1 times, while the part at hand is computed; parts are
                 merged by their log-sum-exps (Liu et al. 2023, with the pairing of Brandon et al. 2023). It takes any
                 number of heads, so also grouped queries over few key-value heads, and holds the keys and values of
                 two ranks at a time. This is the default. Under a local window they go straight to the ranks that see
                 them, and what nobody sees is neither sent nor computed.
    all_to_all   Two exchanges turn shares of the sequence into shares of the heads and back (Jacobs et al. 2023), and
                 between them attention is that of one process: with dropout of its probabilities, and with learned
                 relative biases. It needs at least C key-value heads, and holds the whole sequence of its heads.

Bytes that each rank sends in one layer, for K = b k (s/C) d the elements of its keys (k heads), Q those of its queries,
and e bytes of an element:

    ring         forward (C-1) 2 K e       backward (C-1) (2 K e + 2 K 4), the gradients being sums in fp32
    and within a window, for S tokens of the rank's that others see and R of theirs that it sees (`tokens_sent`), each
                 of 2 k d b elements: forward S e, backward S e + R 4
    all_to_all   forward (C-1)/C (2 Q + 2 K) e, and the same backward
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.ops.partial_attention import (
    NO_KERNELS,
    Gradients,
    PartKernel,
    PartKernels,
    attend_part,
    attend_part_backward,
    merge_part,
)
from megatron.ops.sight import Bounds, Sight
from megatron.parallel.mesh import Axis
from megatron.parallel.visible import seen_keys, visible_parts

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


Waiting = Callable[[], Tensor]
"""Waits for what is on its way, and returns it."""


class Route:
    """How the keys and values of other ranks come to this one, and their gradients go home; over `shifts`, in order.

    At shift t a rank computes with the keys of rank r - t. half: tokens of a chunk.
    Without a window everything travels round the ring: each rank passes on what it has, and the gradients of a rank's
    keys gather on the way. Within one, keys go straight to those who see them, and gradients straight back.
    """

    def __init__(self, axis: Axis, half: int, window: int | None) -> None:
        self.rank, self.size = axis.rank, axis.size
        self.half, self.window = half, window
        self.group = axis.group.group_name if axis.group is not None else ""
        self.shifts = [shift for shift in range(self.size) if window is None or self._is_seen(shift)]

    def owner(self, shift: int) -> int:
        """Return the rank whose keys are computed with at a shift."""
        return (self.rank - shift) % self.size

    def keys(self, shift: int) -> slice:
        """Return which of their owner's tokens the keys are that come at a shift."""
        if self.window is None or shift == 0:
            return slice(0, 2 * self.half)
        return seen_keys(self.rank, self.owner(shift), self.size, self.half, self.window)

    def bring(self, own: Tensor, held: Tensor, shift: int) -> Waiting:
        """Start to bring the keys and values [2, b, k, tokens, d] of a shift. held: those of the shift before."""
        if self.window is None:
            return self._exchange(held, (self.rank + 1) % self.size, held.shape, (self.rank - 1) % self.size)
        receiver = (self.rank + shift) % self.size
        ours, theirs = seen_keys(receiver, self.rank, self.size, self.half, self.window), self.keys(shift)
        shape = (*own.shape[:3], theirs.stop - theirs.start, own.shape[4])
        return self._exchange(own[:, :, :, ours], receiver, shape, self.owner(shift))

    def give_back(self, sums: Tensor, earlier: Waiting | None, shift: int) -> Waiting:
        """Start to send the sums for the keys of a shift towards their owner; in return come sums for our own.

        earlier: what the shift before returned. The last one's result is all that has come for our own.
        """
        if self.window is None:
            travelling = sums if earlier is None else sums + earlier()
            return self._exchange(travelling, (self.rank + 1) % self.size, sums.shape, (self.rank - 1) % self.size)
        giver = (self.rank + shift) % self.size
        ours = seen_keys(giver, self.rank, self.size, self.half, self.window)
        shape = (*sums.shape[:3], ours.stop - ours.start, sums.shape[4])
        arriving = self._exchange(sums, self.owner(shift), shape, giver)
        whole = (*sums.shape[:3], 2 * self.half, sums.shape[4])

        def all_so_far() -> Tensor:
            total = torch.zeros(whole, dtype=sums.dtype, device=sums.device) if earlier is None else earlier()
            total[:, :, :, ours] += arriving()
            return total

        return all_so_far

    def _is_seen(self, shift: int) -> bool:
        """Return whether any rank sees anything of the rank that is `shift` before it."""
        pairs = ((rank, (rank - shift) % self.size) for rank in range(self.size))
        return any(visible_parts(*pair, self.size, self.half, self.window) for pair in pairs)

    def _exchange(self, tensor: Tensor, receiver: int, shape: tuple[int, ...], sender: int) -> Waiting:
        """Start to send `tensor` to one rank and to receive one of `shape` from another."""
        sent, received = [0] * self.size, [0] * self.size
        sent[receiver], received[sender] = tensor.numel(), math.prod(shape)
        pending = _OPS.all_to_all_single(tensor.contiguous().view(-1), received, sent, self.group)
        return lambda: _OPS.wait_tensor(pending).view(shape)


class Part(NamedTuple):
    """Queries and keys at hand, as slices of them, and what these queries see of these keys.

    causal: query i sees keys 0..i. Where that says too little, bounds for a kernel, or a bias for the formula.
    """

    query: slice
    key: slice
    causal: bool = False
    bounds: Bounds | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """Computes the parts of a ring. kernels: what computes them; those of alibi are computed by the formula."""

    sight: Sight
    kernels: PartKernels = NO_KERNELS

    def at_hand(self, route: Route, shift: int, device: torch.device) -> Iterator[Part]:
        """Yield the parts of one shift."""
        sight, owner, start = self.sight, route.owner(shift), route.keys(shift).start
        length = 2 * route.half * route.size
        for part in visible_parts(route.rank, owner, route.size, route.half, route.window):
            columns = slice(part.key.start - start, part.key.stop - start)
            if not (part.cut or sight.slopes is not None or sight.segments is not None):
                yield Part(part.query, columns, part.causal)
                continue
            queries, keys = (positions_of(rank, route.size, length, device) for rank in (route.rank, owner))
            queries, keys = queries[part.query], keys[part.key]
            if self.kernels.limited is not None and sight.slopes is None:
                yield Part(part.query, columns, bounds=sight.bounds_of(queries, keys))
            else:
                bias = sight.distance_bias(queries, keys).masked_fill(~sight.seen(queries, keys), float("-inf"))
                yield Part(part.query, columns, bias=bias)

    def forward(self, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part's output and log-sum-exp."""
        kernel = self._kernel(part)
        if kernel is not None:
            return kernel.forward(query, key, value, self.sight.scale, part.causal, part.bounds)
        return attend_part(query, key, value, self.sight.scale, part.causal, part.bias)

    def backward(
        self, part: Part, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> Gradients:
        """Return what the part adds to the gradients; output and lse are those of the whole."""
        tensors, kernel = (gradient, query, key, value, output, lse), self._kernel(part)
        if kernel is not None:
            return kernel.backward(*tensors, self.sight.scale, part.causal, part.bounds)
        return attend_part_backward(*tensors, self.sight.scale, part.causal, part.bias)

    def _kernel(self, part: Part) -> PartKernel | None:
        if part.bias is not None:
            return None
        return self.kernels.plain if part.bounds is None else self.kernels.limited


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, sight: Sight, axis: Axis, kernels: PartKernels = NO_KERNELS
) -> Tensor:
    """Return [b, n, s/C, d] of this rank's queries over the whole sequence.

    query: [b, n, s/C, d]; key, value: [b, k, s/C, d]: this rank's tokens, in the order of `local_positions`.
    kernels: what computes its parts.
    """
    route = Route(axis, query.shape[2] // 2, sight.window)
    result: Tensor = _RingAttention.apply(query, key, value, Parts(sight, kernels), route)
    return result


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, route: Route) -> Tensor:
        output, lse = ring_forward(query, key, value, parts, route)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts, ctx.route = parts, route
        return output

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        found = ring_backward(gradient[0].contiguous(), query, key, value, output, lse, ctx.parts, ctx.route)
        return (*found, None, None)


def ring_forward(query: Tensor, key: Tensor, value: Tensor, parts: Parts, route: Route) -> tuple[Tensor, Tensor]:
    """Return the output in the query's dtype, and the log-sum-exp [b, n, s/C] in fp32; nothing of it has gradients."""
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=torch.float32, device=query.device)
    own = held = torch.stack((key, value))
    for shift, following in _with_next(route.shifts):
        arriving = None if following is None else route.bring(own, held, following)
        for part in parts.at_hand(route, shift, query.device):
            keys, values = held[:, :, :, part.key]
            found = parts.forward(part, query[:, :, part.query], keys, values)
            merge_part(output[:, :, part.query], lse[:, :, part.query], *found)
        held = held if arriving is None else arriving()
    # Where it is of that dtype already nothing may be called: see `collectives._as`.
    return output if output.dtype == query.dtype else output.to(query.dtype), lse


def ring_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, parts: Parts, route: Route
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    of_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    of_own = torch.zeros((2, *key.shape), dtype=torch.float32, device=key.device)
    own = held = torch.stack((key, value))
    coming: Waiting | None = None
    for shift, following in _with_next(route.shifts):
        arriving = None if following is None else route.bring(own, held, following)
        of_held = torch.zeros(held.shape, dtype=torch.float32, device=key.device) if shift else of_own
        for part in parts.at_hand(route, shift, query.device):
            keys, values = held[:, :, :, part.key]
            of_rows, local, merged, local_lse = (each[:, :, part.query] for each in (gradient, query, output, lse))
            found = parts.backward(part, of_rows, local, keys, values, merged, local_lse)
            of_query[:, :, part.query] += found.query
            of_held[0, :, :, part.key] += found.key
            of_held[1, :, :, part.key] += found.value
        coming = route.give_back(of_held, coming, shift) if shift else None
        held = held if arriving is None else arriving()
    if coming is not None:
        of_own += coming()
    return of_query.to(query.dtype), of_own[0].to(key.dtype), of_own[1].to(value.dtype)


def _with_next(shifts: list[int]) -> Iterator[tuple[int, int | None]]:
    return zip(shifts, [*shifts[1:], None], strict=True)


def sequence_to_heads(tokens: Tensor, axis: Axis) -> Tensor:
    """Return this rank's share of the heads over the whole sequence, in its order: [b, n, s/C, d] -> [b, n/C, s, d].

    Raises ValueError where C does not divide the heads.
    """
    if tokens.shape[1] % axis.size:
        raise ValueError(f"{tokens.shape[1]} heads do not split over {axis.size} ranks (context_parallel_size)")
    result: Tensor = _Exchange.apply(tokens, axis, True)
    return result


def heads_to_sequence(heads: Tensor, axis: Axis) -> Tensor:
    """Return all heads of this rank's tokens: [b, n/C, s, d] -> [b, n, s/C, d]; the inverse of `sequence_to_heads`."""
    result: Tensor = _Exchange.apply(heads, axis, False)
    return result


class _Exchange(torch.autograd.Function):
    """One of the two exchanges; the other one is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, to_heads: bool) -> Tensor:
        ctx.axis, ctx.to_heads = axis, to_heads
        return _to_heads(tensor, axis) if to_heads else _to_sequence(tensor, axis)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        back = _to_sequence if ctx.to_heads else _to_heads
        return back(gradient[0], ctx.axis), None, None


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
