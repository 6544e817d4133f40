"""Runs that start at the same moment meet their own rank 0."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.launch.command import find_layout, local_environments
from megatron.launch.peers import open_store
from megatron.launch.place import find_place
from megatron.launch.port import VARIABLE, free_port, hold_port, port_of, take_inherited
from tests.launch.forked import Forked, fork
from tests.launch.test_command import launcher


def test_a_held_port_is_nobody_elses() -> None:
    with hold_port(0) as first:
        port = port_of(first)
        with hold_port(port) as second:
            assert port_of(second) != port
        assert free_port(port) != port
    assert free_port(port) == port


def test_a_port_just_left_by_a_run_is_taken_again() -> None:
    """Its connections linger for a minute; the next run of the same config still gets master_port."""
    with hold_port(0) as held:
        port = port_of(held)
        settings: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=5)}
        store = dist.TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=os.dup(held.fileno()), **settings)
        other = dist.TCPStore("127.0.0.1", port, is_master=False, **settings)
        other.set("a", "b")
        del store, other
    with hold_port(port) as again:
        assert port_of(again) == port


def meet(name: str) -> int:
    """Run inside a rank: tell the run's name to its ranks through its store, and print what they were told."""
    place = find_place(os.environ)
    store = open_store(place, seconds=20)
    assert VARIABLE not in os.environ
    if place.rank == 0:
        store.set("name", name)
    told = store.get("name").decode()
    print(f"rank {place.rank} of {name} met {told}")
    store.add("read", 1)
    while place.rank == 0 and store.add("read", 0) < 2:
        pass
    return 0 if told == name else 1


def test_two_runs_that_start_at_once_meet_their_own_ranks(tmp_path: Path) -> None:
    """Both are asked to use one port; the second run's rank comes first, and finds no other run's rank 0."""
    keys = launcher(num_gpus=2, master_port=free_port(0))
    layout = find_layout(keys, {"DS_ACCELERATOR": "cpu"})
    with hold_port(keys.master_port) as one, hold_port(keys.master_port) as two:
        ranks: list[Forked] = []
        for name, held in (("two", two), ("one", one)):
            environments = local_environments(layout, keys, {"DS_ACCELERATOR": "cpu"}, held)
            for rank, environment in reversed(list(enumerate(environments))):
                ranks.append(fork(lambda name=name: meet(name), tmp_path / f"{name}{rank}", environment))
        for rank in ranks:
            code, output = rank.end()
            assert code == 0, output


@pytest.mark.parametrize("text", [None, "", "no number"])
def test_other_launchers_hold_nothing(text: str | None) -> None:
    assert take_inherited({} if text is None else {VARIABLE: text}) is None
