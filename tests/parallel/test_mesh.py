from __future__ import annotations

import torch
import torch.distributed as dist

from megatron.parallel.mesh import Mesh
from tests.ranks import run_ranks


def test_a_single_process_needs_no_torch_distributed() -> None:
    mesh = Mesh.single()
    for axis in (mesh.dp, mesh.tp, mesh.pp, mesh.cp, mesh.replicas, mesh.ep, mesh.world):
        assert (axis.size, axis.rank, axis.group) == (1, 0, None)
    assert mesh.device == torch.device("cpu")
    assert mesh.describe() == "rank 0 pp0 dp0 tp0"


def test_groups_of_four_ranks_reach_the_right_neighbours() -> None:
    def sums() -> dict[str, float]:
        mesh = Mesh.create(tp=2, pp=1)
        result = {"rank": float(mesh.world.rank), "place": float(10 * mesh.dp.rank + mesh.tp.rank)}
        for axis in (mesh.dp, mesh.tp, mesh.pp):
            value = torch.tensor(float(2**mesh.world.rank))
            dist.all_reduce(value, group=axis.group)
            result[axis.name] = value.item()
        return result

    results = run_ranks(4, sums)
    assert [result["place"] for result in results] == [0, 1, 10, 11]
    assert [result["dp"] for result in results] == [1 + 4, 2 + 8, 1 + 4, 2 + 8]
    assert [result["tp"] for result in results] == [1 + 2, 1 + 2, 4 + 8, 4 + 8]
    assert [result["pp"] for result in results] == [1, 2, 4, 8]


def test_context_ranks_are_replicas_beside_the_data_axis() -> None:
    def sums() -> dict[str, float]:
        mesh = Mesh.create(cp=2, ep=2)
        result = {}
        for axis in (mesh.dp, mesh.cp, mesh.replicas, mesh.ep):
            value = torch.tensor(float(2**mesh.world.rank))
            dist.all_reduce(value, group=axis.group)
            result[axis.name] = value.item()
        return {**result, "text": mesh.describe()}

    results = run_ranks(4, sums)
    assert [result["dp"] for result in results] == [1 + 4, 2 + 8, 1 + 4, 2 + 8]
    assert [result["cp"] for result in results] == [1 + 2, 1 + 2, 4 + 8, 4 + 8]
    assert [result["ep"] for result in results] == [1 + 2, 1 + 2, 4 + 8, 4 + 8]
    assert [result["replicas"] for result in results] == [15] * 4
    assert results[3]["text"] == "rank 3 pp0 dp1 cp1 tp0"
