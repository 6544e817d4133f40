from __future__ import annotations

import pytest

from megatron.errors import LaunchError
from megatron.parallel.topology import Coordinate, Topology


def test_model_is_innermost_and_pipe_outermost() -> None:
    topology = Topology(pp=2, dp=3, tp=4)
    assert topology.rank(Coordinate(pipe=1, data=2, model=3)) == 1 * 12 + 2 * 4 + 3
    assert topology.coordinate(13) == Coordinate(pipe=1, data=0, model=1)


@pytest.mark.parametrize(("pp", "dp", "tp"), [(1, 1, 1), (2, 1, 3), (1, 4, 2), (3, 2, 2)])
def test_rank_and_coordinate_are_inverse(pp: int, dp: int, tp: int) -> None:
    topology = Topology(pp, dp, tp)
    ranks = [topology.rank(topology.coordinate(rank)) for rank in range(topology.world_size)]
    assert ranks == list(range(pp * dp * tp))
    with pytest.raises(ValueError, match="is not in"):
        topology.coordinate(topology.world_size)


@pytest.mark.parametrize(("axis", "size"), [("pipe", 2), ("data", 3), ("model", 4)])
def test_groups_partition_the_ranks_along_one_axis(axis: str, size: int) -> None:
    topology = Topology(pp=2, dp=3, tp=4)
    groups = topology.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(24))
    for group in groups:
        coordinates = [topology.coordinate(rank) for rank in group]
        assert [getattr(coordinate, axis) for coordinate in coordinates] == list(range(size))
        assert len({coordinate._replace(**{axis: 0}) for coordinate in coordinates}) == 1


def test_tensor_groups_are_neighbours() -> None:
    assert Topology(pp=1, dp=2, tp=2).groups("model") == [[0, 1], [2, 3]]


def test_data_axis_takes_what_is_left() -> None:
    assert Topology.from_world(12, tp=2, pp=3) == Topology(pp=3, dp=2, tp=2)


def test_a_world_that_cannot_be_divided_says_why() -> None:
    with pytest.raises(LaunchError) as error:
        Topology.from_world(6, tp=4)
    assert "6 processes cannot be divided into groups of 4 * 1 = 4" in str(error.value)
    assert "Start a multiple of 4 processes" in str(error.value)
