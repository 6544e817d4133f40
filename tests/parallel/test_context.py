"""Attention over a context axis equals attention of one process: outputs, gradients, and the bytes that it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.data.batch import Batch, shard_sequence
from megatron.ops.attention import attention_reference
from megatron.parallel import context
from megatron.parallel.context import (
    Sight,
    heads_to_sequence,
    local_positions,
    positions_of,
    ring_attention,
    sequence_to_heads,
)
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.visible import seen_keys, tokens_sent, visible_parts
from tests.ranks import run_ranks

LENGTH, HEADS, SCALE = 24, 4, 0.4


def test_ranks_hold_the_sequence_once_in_pairs_of_chunks() -> None:
    assert [positions_of(rank, 2, 8).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    for size in (1, 2, 3, 4):
        everything = torch.cat([positions_of(rank, size, LENGTH) for rank in range(size)])
        assert everything.sort().values.tolist() == list(range(LENGTH))
    assert local_positions(Axis("cp", 2, 1), 8).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="10 tokens do not split into 2 \\* 2 chunks"):
        positions_of(0, 2, 10)


@pytest.mark.parametrize("window", [None, 0, 1, 2, 3, 5, 9, 100])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_hold_each_visible_pair_once(size: int, window: int | None) -> None:
    length = 4 * 2 * size
    for query_rank in range(size):
        for key_rank in range(size):
            queries, keys = positions_of(query_rank, size, length), positions_of(key_rank, size, length)
            distance = queries.unsqueeze(1) - keys
            seen = (distance >= 0) & (distance <= (length if window is None else window))
            count = torch.zeros(distance.shape, dtype=torch.int64)
            for part in visible_parts(query_rank, key_rank, size, queries.numel() // 2, window):
                inside = seen[part.query, part.key]
                assert inside.any()
                count[part.query, part.key] += 1
                assert part.causal or part.cut or inside.all()
                if not part.cut and part.causal:
                    assert torch.equal(inside, (distance >= 0)[part.query, part.key])
            assert (count[seen] == 1).all()


@pytest.mark.parametrize("window", [None, 0, 1, 2, 3, 5, 9, 100])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_sent_is_what_somebody_sees(size: int, window: int | None) -> None:
    half, length = 3, 2 * 3 * size
    for query_rank in range(size):
        for key_rank in set(range(size)) - {query_rank}:
            distance = positions_of(query_rank, size, length).unsqueeze(1) - positions_of(key_rank, size, length)
            seen = ((distance >= 0) & (distance <= (length if window is None else window))).any(dim=0)
            chunks = [index for index in range(2) if seen[index * half : (index + 1) * half].any()]
            sent = seen_keys(query_rank, key_rank, size, half, window)
            assert (sent.stop - sent.start) == half * len(chunks)
            assert seen.sum() == seen[sent].sum()
    if window == 0:
        assert tokens_sent(1, size, half, window) == (0, 0)
    if window == 1 and size > 2:  # each chunk is seen by the next one only, which is a neighbour's
        assert tokens_sent(1, size, half, window) == (2 * half, 2 * half)


def test_every_rank_has_the_same_work_at_every_step() -> None:
    size, half = 4, 3
    for step in range(size):
        work = set()
        for rank in range(size):
            parts = visible_parts(rank, (rank - step) % size, size, half)
            shapes = [(part.query.stop - part.query.start, part.key.stop - part.key.start) for part in parts]
            work.add(sum(rows * columns for rows, columns in shapes))
        assert len(work) == 1


def test_a_batch_is_cut_after_its_labels_are_known() -> None:
    tokens = torch.arange(16).view(2, 8)
    batch = Batch(tokens, tokens + 1, (tokens % 3 > 0).float(), torch.zeros(2, 8, dtype=torch.int64))
    assert shard_sequence(batch, Mesh.single().cp) is batch
    part = shard_sequence(batch, Axis("cp", 2, 1))
    assert part.tokens.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert torch.equal(part.labels, part.tokens + 1)
    assert torch.equal(part.loss_mask, (part.tokens % 3 > 0).float())
    assert part.segments is batch.segments


def draw(groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return query, key, value of the whole sequence and the gradient of the output."""
    generator = torch.Generator().manual_seed(groups)
    sizes = [(2, HEADS, LENGTH, 8), *[(2, groups, LENGTH, 8)] * 2, (2, HEADS, LENGTH, 8)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def sights() -> dict[str, Sight]:
    segments = torch.stack([torch.arange(LENGTH) // 7, torch.arange(LENGTH) // 10])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    return {
        "causal": Sight(SCALE),
        "window": Sight(SCALE, window=5),
        "narrow": Sight(SCALE, window=1),
        "itself": Sight(SCALE, window=0),
        "documents": Sight(SCALE, segments=segments),
        "alibi": Sight(SCALE, slopes=slopes),
        "everything": Sight(SCALE, window=9, slopes=slopes, segments=segments),
    }


def bias_of(sight: Sight) -> Tensor:
    """Return [b, n, s, s], by the definition."""
    places = torch.arange(LENGTH)
    distance = places.unsqueeze(1) - places
    seen = (distance >= 0) & (distance <= (LENGTH if sight.window is None else sight.window))
    segments = torch.zeros(2, LENGTH) if sight.segments is None else sight.segments
    seen = seen & (segments.unsqueeze(2) == segments.unsqueeze(1)).unsqueeze(1)
    slopes = torch.zeros(HEADS) if sight.slopes is None else sight.slopes
    return (-slopes.view(-1, 1, 1) * distance).masked_fill(~seen, float("-inf"))


def alone(groups: int, sight: Sight, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the output and the gradients of query, key and value in one process."""
    *tensors, gradient = draw(groups, dtype)
    leaves = [tensor.float().requires_grad_() for tensor in tensors]
    output = attention_reference(*leaves, SCALE, causal=False, mask=bias_of(sight))
    output.backward(gradient.float())
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def all_to_all(query: Tensor, key: Tensor, value: Tensor, sight: Sight, axis: Axis) -> Tensor:
    heads = [sequence_to_heads(each, axis) for each in (query, key, value)]
    bias = bias_of(sight)
    bias = bias.chunk(axis.size, dim=1)[axis.rank]
    return heads_to_sequence(attention_reference(*heads, SCALE, causal=False, mask=bias), axis)


def together(method: Callable, groups: int, sight: Sight, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Run inside a rank: the same of this rank's tokens."""
    axis = Mesh.create(cp=torch.distributed.get_world_size()).cp
    mine = local_positions(axis, LENGTH)
    *leaves, gradient = [each[:, :, mine].contiguous() for each in draw(groups, dtype)]
    for leaf in leaves:
        leaf.requires_grad_()
    output = method(*leaves, sight, axis)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def compare(ranks: list[list[Tensor]], wanted: list[Tensor], **tolerance: float) -> None:
    for rank, found in enumerate(ranks):
        mine = positions_of(rank, len(ranks), LENGTH)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.float(), theirs[:, :, mine], **tolerance)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ring_equals_one_process(size: int) -> None:
    cases = [(groups, sight) for groups in (4, 2, 1) for sight in sights().values()]

    def run() -> list[list[Tensor]]:
        return [together(ring_attention, groups, sight) for groups, sight in cases]

    ranks = run_ranks(size, run)
    for index, (groups, sight) in enumerate(cases):
        compare([rank[index] for rank in ranks], alone(groups, sight), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_all_to_all_equals_one_process(size: int) -> None:
    sight = sights()["everything"]
    ranks = run_ranks(size, together, all_to_all, 4, sight)
    compare(ranks, alone(4, sight), rtol=1e-5, atol=2e-6)


def test_the_ring_rounds_to_bf16_once() -> None:
    ranks = run_ranks(2, together, ring_attention, 2, sights()["causal"], torch.bfloat16)
    compare(ranks, alone(2, sights()["causal"], torch.bfloat16), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["causal", "window"])
def test_torch_compile_traces_the_ring_whole(name: str) -> None:
    sight = sights()[name]

    def run(method: Callable) -> tuple[list[Tensor], list[Tensor]]:
        compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
        return together(compiled, 4, sight), together(method, 4, sight)

    for found, wanted in run_ranks(2, run, ring_attention):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_heads_that_do_not_split_are_said() -> None:
    with pytest.raises(ValueError, match="3 heads do not split over 2 ranks"):
        sequence_to_heads(torch.zeros(1, 3, 4, 8), Axis("cp", 2, 0))


class _Counter:
    """The functional collectives, with the bytes counted that a rank sends to others."""

    def __init__(self, operations: Any) -> None:
        self._operations = operations
        self.wait_tensor = operations.wait_tensor
        self.sent = 0

    def all_to_all_single(self, tensor: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        row = tensor.numel() // max(1, tensor.shape[0]) * tensor.element_size()
        own = torch.distributed.get_rank()
        self.sent += sum(count * row for rank, count in enumerate(sent) if rank != own)
        return self._operations.all_to_all_single(tensor, received, sent, group)


def count_bytes(method: Callable, groups: int, dtype: torch.dtype, window: int | None = None) -> tuple[int, int]:
    """Run inside a rank: bytes that it sends in the forward pass, and in both passes."""
    counter = context._OPS = _Counter(context._OPS)
    axis = Mesh.create(cp=torch.distributed.get_world_size()).cp
    mine = local_positions(axis, LENGTH)
    *leaves, gradient = [each[:, :, mine].contiguous().requires_grad_() for each in draw(groups, dtype)]
    output = method(*leaves, Sight(SCALE, window), axis)
    forward = counter.sent
    output.backward(gradient)
    return forward, counter.sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_the_bytes_are_those_of_the_closed_form(size: int, dtype: torch.dtype) -> None:
    groups, element = 4, dtype.itemsize
    keys = queries = 2 * groups * (LENGTH // size) * 8
    forward = (size - 1) * 2 * keys * element
    wanted = forward, forward + (size - 1) * (2 * keys * element + 2 * keys * 4)
    assert run_ranks(size, count_bytes, ring_attention, groups, dtype) == [wanted] * size
    forward = (size - 1) * (2 * queries + 2 * keys) * element // size
    assert run_ranks(size, count_bytes, all_to_all, groups, dtype) == [(forward, 2 * forward)] * size


@pytest.mark.parametrize(
    ("window", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (4, torch.float32), (30, torch.float32)]
)
def test_within_a_window_only_what_is_seen_is_sent(window: int, dtype: torch.dtype) -> None:
    size, groups, token = 4, 2, 2 * 2 * 2 * 8  # keys and values of the two key heads of a token in both rows
    found = run_ranks(size, count_bytes, ring_attention, groups, dtype, window)
    for rank, bytes_sent in enumerate(found):
        keys, gradients = tokens_sent(rank, size, LENGTH // (2 * size), window)
        assert bytes_sent == (keys * token * dtype.itemsize, token * (2 * keys * dtype.itemsize + gradients * 4))
    everything = (size - 1) * LENGTH // size * token * dtype.itemsize
    assert [most <= everything for most, _ in found] == [True] * size
    assert max(most for most, _ in found) == {0: 0, 1: everything // 3, 4: everything // 2}.get(window, everything)
