from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron import logs
from megatron.config.resolve import resolve
from megatron.errors import LaunchError
from megatron.launch import peers
from megatron.launch.failure import Failure
from megatron.launch.peers import PeerWatch, check_in, open_store
from megatron.launch.place import Place
from megatron.launch.port import free_port
from tests.end_to_end.tiny import settings
from tests.launch.forked import fork


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(1, 2, 1, 2, "127.0.0.1", free_port(0), "n1")
    for name, value in place.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"rank 1 on n1: found no rank 0 at .* = 127\.0\.0\.1:\d+ within 0 s"):
        open_store(place, seconds=0.2)


def test_who_is_waited_for_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logs.setup()
    monkeypatch.setattr(peers, "QUIET_SECONDS", 0.1)
    first = Place(0, 3, 0, 3, "127.0.0.1", free_port(0), "n0")
    where = f"127.0.0.1:{first.master_port}"
    with pytest.raises(LaunchError, match=rf"rank 1 on n1: found no rank 0 at .* = {where}"):
        open_store(Place(1, 3, 1, 3, "127.0.0.1", first.master_port, "n1"), seconds=0.5)
    assert f"waiting for rank 0 of 3 at {where}" in capsys.readouterr().err
    with pytest.raises(LaunchError, match="ranks 1-2 of 3: did not come within 0 s; the others are on n0"):
        check_in(open_store(first, seconds=1), first, resolve(settings(tmp_path), 3), "CPU", seconds=0.4)
    assert capsys.readouterr().err.count(f"waiting for ranks 1-2 of 3 at {where}\n") == 1


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def place(rank: int, store: dist.TCPStore, world_size: int = 2) -> Place:
    return Place(rank, world_size, rank, world_size, "127.0.0.1", store.port, f"n{rank}")


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, store: dist.TCPStore) -> None:
    config = resolve(settings(tmp_path), 4)

    def second() -> None:
        with pytest.raises(LaunchError):
            check_in(store, place(1, store, 4), config, "CPU", seconds=0.3)

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.raises(LaunchError, match=r"ranks 2-3 of 4: did not come within 0 s; the others are on n0, n1\."):
        check_in(store, place(0, store, 4), config, "CPU", seconds=0.3)
    thread.join()


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
