from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.errors import LaunchError
from megatron.launch.failure import Failure
from megatron.launch.peers import PeerWatch, open_store
from megatron.launch.place import Place
from megatron.launch.port import free_port
from tests.launch.forked import fork


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


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def place(rank: int, store: dist.TCPStore, world_size: int = 2) -> Place:
    return Place(rank, world_size, rank, world_size, "127.0.0.1", store.port, f"n{rank}")


def test_the_first_to_announce_shows_its_report_and_the_others_end(tmp_path: Path, store: dist.TCPStore) -> None:
    def bystander() -> int:
        PeerWatch(place(0, store), interval=0.05)
        threading.Event().wait(20)
        return 0

    forked = fork(bystander, tmp_path / "output")
    watch = PeerWatch(place(1, store), interval=0.05)
    assert watch.announce(Failure(1, 2, "n1", 5, 1, "text")) is True
    watch.release()
    code, output = forked.end()
    assert code == 1
    assert output.strip() == "rank 0 on host n0 ends because rank 1 on host n1 failed."


def test_the_second_to_announce_keeps_quiet(store: dist.TCPStore) -> None:
    watches = [PeerWatch(place(rank, store), interval=30) for rank in range(2)]
    for watch in watches:
        watch.interval = 0.02
    assert watches[1].announce(Failure(1, 2, "n1", 5, 1, "text")) is True
    watches[1].release()
    assert watches[0].announce(Failure(0, 2, "n0", 5, 1, "text")) is False


def test_a_rank_ends_when_the_store_is_gone(tmp_path: Path) -> None:
    def orphan() -> int:
        own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
        PeerWatch(place(1, own), interval=0.05)
        del own
        threading.Event().wait(20)
        return 0

    code, output = fork(orphan, tmp_path / "output").end()
    assert code == 1
    assert "ends because the process that holds the run together" in output


def test_stopping_ends_the_watch(store: dist.TCPStore) -> None:
    watch = PeerWatch(place(1, store), interval=0.02)
    watch.stop()
    assert not watch._thread.is_alive()
