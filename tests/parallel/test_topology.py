from __future__ import annotations

import pytest

from megatron.errors import LaunchError
from megatron.parallel.topology import Coordinate, Topology


def test_model_is_innermost_and_pipe_outermost() -> None:
    topology = Topology(pp=2, dp=3, cp=2, tp=4)
    assert topology.rank(Coordinate(pipe=1, data=2, context=1, model=3)) == ((1 * 3 + 2) * 2 + 1) * 4 + 3
    assert topology.coordinate(29) == Coordinate(pipe=1, data=0, context=1, model=1)


@pytest.mark.parametrize(("pp", "dp", "cp", "tp"), [(1, 1, 1, 1), (2, 1, 1, 3), (1, 4, 3, 2), (3, 2, 2, 2)])
def test_rank_and_coordinate_are_inverse(pp: int, dp: int, cp: int, tp: int) -> None:
    topology = Topology(pp, dp, cp, tp)
    ranks = [topology.rank(topology.coordinate(rank)) for rank in range(topology.world_size)]
    assert ranks == list(range(pp * dp * cp * tp))
    with pytest.raises(ValueError, match="is not in"):
        topology.coordinate(topology.world_size)


@pytest.mark.parametrize(("axis", "size"), [("pipe", 2), ("data", 3), ("context", 2), ("model", 4)])
def test_groups_partition_the_ranks_along_one_axis(axis: str, size: int) -> None:
    topology = Topology(pp=2, dp=3, cp=2, tp=4)
    groups = topology.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(48))
    for group in groups:
        coordinates = [topology.coordinate(rank) for rank in group]
        assert [getattr(coordinate, axis) for coordinate in coordinates] == list(range(size))
        assert len({coordinate._replace(**{axis: 0}) for coordinate in coordinates}) == 1


def test_tensor_groups_are_neighbours() -> None:
    assert Topology(dp=2, tp=2).groups("model") == [[0, 1], [2, 3]]


def test_replicas_are_all_that_hold_the_same_parameters() -> None:
    topology = Topology(pp=2, dp=2, cp=2, tp=2)
    assert topology.replicas() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert Topology(dp=3, tp=2).replicas() == Topology(dp=3, tp=2).groups("data")


def test_experts_are_shared_by_neighbours_among_the_replicas() -> None:
    topology = Topology(dp=2, cp=2, tp=2)
    assert topology.expert_groups(1) == [[rank] for rank in range(8)]
    assert topology.expert_groups(2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.expert_groups(4) == topology.replicas()
    with pytest.raises(LaunchError, match="moe_expert_parallel_size = 3: the 4 ranks with the same parameters"):
        topology.expert_groups(3)


def test_data_axis_takes_what_is_left() -> None:
    assert Topology.from_world(12, tp=2, pp=3) == Topology(pp=3, dp=2, tp=2)
    assert Topology.from_world(12, tp=2, cp=3) == Topology(dp=2, cp=3, tp=2)


def test_a_world_that_cannot_be_divided_says_why() -> None:
    with pytest.raises(LaunchError) as error:
        Topology.from_world(6, tp=4)
    assert "6 processes cannot be divided into groups of 4 * 1 * 1 = 4" in str(error.value)
    assert "Start a multiple of 4 processes" in str(error.value)
