from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.rng import RngStreams, forked_stream, hash_seed


def draw(streams: RngStreams, iteration: int, micro_batch: int) -> float:
    streams.start_micro_batch(iteration, micro_batch)
    return float(torch.rand(()))


def test_a_stream_depends_on_the_place_and_on_nothing_before_it() -> None:
    streams = RngStreams(1234, Mesh.single())
    first = draw(streams, 7, 1)
    torch.rand(5)
    assert draw(streams, 7, 1) == first


def test_each_place_has_its_own_stream() -> None:
    mesh = Mesh.single()
    meshes = [mesh, replace(mesh, replicas=Axis("replicas", 2, 1)), replace(mesh, pp=Axis("pp", 2, 1))]
    places = [(seed, m, i, j) for seed in (1, 2) for m in meshes for i in (0, 1) for j in (0, 1)]
    draws = [draw(RngStreams(seed, m), i, j) for seed, m, i, j in places]
    assert len(set(draws)) == len(places)


def test_tensor_parallel_ranks_share_a_stream() -> None:
    mesh = Mesh.single()
    other = replace(mesh, tp=Axis("tp", 2, 1))
    assert draw(RngStreams(3, mesh), 0, 0) == draw(RngStreams(3, other), 0, 0)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert hash_seed(1234, "head.weight") == 4309234680352071294
    assert hash_seed(12, 34) != hash_seed(1, 234)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fork_on_a_gpu_leaves_the_shared_stream_alone() -> None:
    def draws(rank: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        with forked_stream(rank, torch.device("cuda")):
            own = torch.rand(4, device="cuda")
        return own, torch.rand(4, device="cuda")

    (own, after), (own2, after2) = draws(0), draws(1)
    assert not torch.equal(own, own2)
    assert torch.equal(after, after2)


def test_a_fork_depends_on_the_shared_stream_and_the_rank() -> None:
    def draw(seed: int, rank: int) -> float:
        torch.manual_seed(seed)
        with forked_stream(rank, torch.device("cpu")):
            return float(torch.rand(()))

    assert draw(1, 0) == draw(1, 0)
    assert len({draw(seed, rank) for seed in (1, 2) for rank in range(4)}) == 8
