from __future__ import annotations

import pytest

from megatron.errors import LaunchError
from megatron.launch.peers import open_store
from megatron.launch.place import Place
from megatron.launch.port import free_port


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(1, 2, 1, 2, "127.0.0.1", free_port(0), "n1")
    for name, value in place.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"rank 1 on n1: found no rank 0 at .* = 127\.0\.0\.1:\d+ within 0 s"):
        open_store(place, seconds=0.2)


def test_an_address_of_this_machine_and_a_name_nobody_knows_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"answers, but nobody listens at port .* The address is that of n1 itself"):
        open_store(Place(1, 2, 1, 2, "127.0.0.1", free_port(0), "n1"), seconds=0.2)
    with pytest.raises(LaunchError, match=r"the name no-such\.invalid cannot be resolved on this machine"):
        open_store(Place(1, 2, 1, 2, "no-such.invalid", 7, "n1"), seconds=0.2)
