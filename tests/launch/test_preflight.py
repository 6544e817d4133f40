from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron import logs
from megatron.config.resolve import resolve
from megatron.errors import LaunchError
from megatron.launch import connections, preflight
from megatron.launch.connections import GLOO, choose_interface, try_gloo
from megatron.launch.hosts import HOSTS_VARIABLE
from megatron.launch.place import Place
from megatron.launch.preflight import Card, check_in, count_local, expected_hosts, write_card
from tests.end_to_end.tiny import settings


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def place(rank: int, store: dist.TCPStore, world_size: int, host: str = "") -> Place:
    return Place(rank, world_size, rank, world_size, "127.0.0.1", store.port, host or f"n{rank}")


def together(*calls: Callable[[], object]) -> list[str]:
    """What each of some calls raises as a LaunchError, or "", when they run at the same time."""
    said = [""] * len(calls)

    def call(number: int) -> None:
        try:
            calls[number]()
        except LaunchError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return said


def meet(store: dist.TCPStore, folder: Path, cards: list[dict[str, str]], **changes: object) -> list[str]:
    """Let as many ranks meet as there are cards; each card's facts replace those of this machine."""
    size = len(cards)
    configs = [resolve(settings(folder, **(changes if rank == size - 1 else {})), size) for rank in range(size)]
    calls = []
    for rank, facts in enumerate(cards):
        own = place(rank, store, size)
        card = dataclasses.replace(write_card(own, configs[rank], torch.device("cpu"), "CPU"), **facts)
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        calls.append(lambda c=client, o=own, f=configs[rank], d=card: check_in(c, o, f, d, 5))
    return together(*calls)


def test_ranks_that_are_alike_meet(store: dist.TCPStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    assert meet(store, tmp_path, [{}, {"device": "GPU"}, {}]) == ["", "", ""]
    assert capsys.readouterr().err.count("3 processes on 3 hosts (n0, n1, n2): 2 x CPU; 1 x GPU\n") == 3


def test_all_that_differ_are_named_on_every_rank(store: dist.TCPStore, tmp_path: Path) -> None:
    old, older = {"torch": "2.12"}, {"torch": "2.11", "code": "c0de"}
    said = meet(store, tmp_path, [{"torch": "2.13"}, old, {"torch": "2.13"}, {"torch": "2.13"}, older])
    assert len(set(said)) == 1
    assert "torch is 2.11 for rank 4 (n4); 2.12 for rank 1 (n1): but 2.13 for ranks 0, 2-3 (n0, n2, n3)." in said[0]
    assert "this library (hash of its files) is c0de for rank 4 (n4): but " in said[0]


def test_a_host_without_the_c_kernels_is_named(store: dist.TCPStore, tmp_path: Path) -> None:
    said = meet(store, tmp_path, [{"kernels": "there"}, {"kernels": "missing"}, {"kernels": "there"}])
    assert len(set(said)) == 1
    assert "the library of C++ kernels is missing for rank 1 (n1): but there for ranks 0, 2 (n0, n2)." in said[0]
    assert "deepy.py doctor" in said[0]


def test_whether_the_c_kernels_are_there_stands_on_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, config = Place(0, 1, 0, 1, "127.0.0.1", 1, "n0"), resolve(settings(tmp_path), 1)
    for reason, kernels in (("", "there"), ("no compiler", "missing")):
        monkeypatch.setattr(preflight, "make_ready", lambda _, found=reason: found)
        assert write_card(own, config, torch.device("cpu"), "CPU").kernels == kernels
    monkeypatch.setattr(preflight, "_cuda", lambda: "")  # which only a build of torch for CUDA can tell
    assert write_card(own, config, torch.device("cuda"), "GPU").kernels == "not used"


@pytest.mark.parametrize("suffix", [".py", ".cpp", ".cu", ".cuh", ".h", ".json"])
def test_every_file_that_changes_results_is_in_the_hash_of_the_code(
    suffix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "launch" / f"any{suffix}"
    source.parent.mkdir()
    monkeypatch.setattr(preflight, "__file__", str(source.with_name("preflight.py")))
    found = set()
    for text in ("one", "other"):
        source.write_text(text)
        found.add(preflight.hash_of_code.__wrapped__())
    assert len(found) == 2
    source.with_suffix(".pyc").write_text("what Python keeps for itself")
    assert preflight.hash_of_code.__wrapped__() in found


def test_the_keys_in_which_a_config_differs_are_named(store: dist.TCPStore, tmp_path: Path) -> None:
    said = meet(store, tmp_path, [{}, {}, {}], seed=7, train_iters=9)
    assert len(set(said)) == 1
    assert "for rank 2 (n2): but" in said[0]
    for change in ("seed = 7 (rank 0: 1234)", "train_iters = 9 (rank 0: 8)"):
        assert change in said[0]


def test_who_is_missing_is_named_with_its_host(
    store: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.setup()
    monkeypatch.setattr(preflight, "QUIET_SECONDS", 0.1)
    config, own = resolve(settings(tmp_path), 4), place(0, store, 4)
    card = write_card(own, config, torch.device("cpu"), "CPU")
    hosts = ["n0", "n0", "no-such.invalid", "no-such.invalid"]
    with pytest.raises(LaunchError) as caught:
        check_in(store, own, config, card, 0.4, hosts)
    said = str(caught.value)
    assert "ranks 1-3 (n0, no-such.invalid) of 4: did not come within 0 s; the others are on n0." in said
    assert "no-such.invalid: the name no-such.invalid cannot be resolved on this machine." in said
    where = f"of 4 at 127.0.0.1:{store.port}\n"
    assert capsys.readouterr().err.count(f"waiting for ranks 1-3 (n0, no-such.invalid) {where}") == 1


def test_a_rank_that_is_there_twice_is_named_at_once(store: dist.TCPStore, tmp_path: Path) -> None:
    config, card = resolve(settings(tmp_path), 2), None
    first, second = place(1, store, 2, "pod-a"), place(1, store, 2, "pod-b")
    card = write_card(first, config, torch.device("cpu"), "CPU")
    with pytest.raises(LaunchError, match="did not come"):
        check_in(store, first, config, card, 0.1)
    with pytest.raises(LaunchError, match="rank 1: is there twice: on pod-a and on pod-b"):
        check_in(store, second, config, card, 30)


def test_ranks_count_who_is_on_their_host(store: dist.TCPStore) -> None:
    hosts, found = ["a", "b", "a"], dict[int, Place]()

    def count(rank: int) -> None:
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        unknown = dataclasses.replace(place(rank, store, 3, hosts[rank]), is_local_known=False)
        found[rank] = count_local(client, unknown, 5, ())

    assert together(*[lambda r=rank: count(r) for rank in range(3)]) == ["", "", ""]
    assert [(found[rank].local_rank, found[rank].local_world_size) for rank in range(3)] == [(0, 2), (0, 1), (1, 2)]


def test_different_numbers_of_processes_are_said(store: dist.TCPStore, tmp_path: Path) -> None:
    config = resolve(settings(tmp_path), 1)
    card = write_card(place(0, store, 1), config, torch.device("cpu"), "CPU")
    store.add("deepy/cards/1", 1)
    store.set("deepy/card/1", "4 x")
    with pytest.raises(LaunchError, match="the number of processes is 4 for rank 1: but rank 0 has 2"):
        check_in(store, place(0, store, 2), config, card, 5)


def test_hosts_that_are_expected() -> None:
    assert expected_hosts(3, {HOSTS_VARIABLE: "me@n1:0,1;n2:0"}) == ["n1", "n1", "n2"]
    assert expected_hosts(2, {HOSTS_VARIABLE: "n1:0,1;n2:0"}) == []
    assert expected_hosts(2, {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}) == ["n1", "n2"]


def card_of(host: str, address: str) -> Card:
    return Card(host, address, "CPU", "cpu", 2, "3.11", "2", "none", "0", "c", "there", "c")


def test_gloo_is_kept_from_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GLOO, raising=False)
    monkeypatch.setattr(connections, "interface_of", {"10.0.0.1": "eth0", "10.0.0.2": "eth0"}.get)
    monkeypatch.setattr(connections, "own_name_is_loopback", lambda: True)
    monkeypatch.setattr(connections, "address_towards", lambda host, port: "10.0.0.1" if host == "10.0.0.2" else "")
    cards = [card_of("n0", "127.0.0.1"), card_of("n1", "10.0.0.2")]
    for rank in range(2):  # rank 0 asks where rank 1's address leads; rank 1 has seen it on its way to MASTER_ADDR
        choose_interface(Place(rank, 2, 0, 1, "n0", 7, f"n{rank}"), cards)
        assert os.environ.pop(GLOO) == "eth0"
    choose_interface(Place(0, 2, 0, 2, "n0", 7, "n0"), [cards[0], cards[0]])
    assert GLOO not in os.environ
    monkeypatch.setenv(GLOO, "ib0")
    choose_interface(Place(0, 2, 0, 1, "n0", 7, "n0"), cards)
    assert os.environ[GLOO] == "ib0"


def test_ranks_that_cannot_connect_are_told_their_interfaces(store: dist.TCPStore) -> None:
    with pytest.raises(
        LaunchError, match=r"rank 1 on n1: cannot speak with the other ranks .* This host has lo 127"
    ) as e:
        try_gloo(store, place(1, store, 2), 0.5)
    assert "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in str(e.value)
