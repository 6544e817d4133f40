"""The first words between ranks: that every group can speak, and how fast two hosts do.

A wrong interface or a firewall between two hosts shows here, within a minute and by name, and not in the first step
after half an hour.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron import logs
from megatron.errors import LaunchError, Problem
from megatron.launch.interface import address_towards, interface_of, interfaces, is_loopback, own_name_is_loopback
from megatron.launch.place import Place
from megatron.launch.preflight import Card
from megatron.parallel.mesh import Axis, Mesh

GLOO = "GLOO_SOCKET_IFNAME"
_MEBIBYTE = 2**20
_TRIES = 3
logger = logs.get_logger(__name__)


def choose_interface(place: Place, cards: Sequence[Card]) -> None:
    """Let gloo listen where the other hosts can reach it, where it would listen at the loopback and nobody has chosen.

    The interface is the one that leads to MASTER_ADDR; on rank 0's own host, the one that leads to another host."""
    if GLOO in os.environ or len({card.host for card in cards}) == 1 or not own_name_is_loopback():
        return
    others = [card.address for card in cards if card.host != place.host and not is_loopback(card.address)]
    candidates = [cards[place.rank].address, *(address_towards(other, place.master_port) for other in others[:1])]
    names = [interface_of(address) for address in candidates if not is_loopback(address)]
    if names and names[0]:
        os.environ[GLOO] = names[0]
        logger.info(f"this host's name is its loopback's; gloo uses {names[0]}, which leads to the other hosts")


def try_gloo(store: dist.Store, place: Place, seconds: float) -> None:
    """Connect every rank to every other by gloo, in a group that is then given up.

    Raises LaunchError with this host's interfaces where that takes longer than `seconds`, or fails."""
    limit, ones = timedelta(seconds=seconds), torch.ones(1)
    try:
        group = dist.ProcessGroupGloo(dist.PrefixStore("first words", store), place.rank, place.world_size, limit)
        group.allreduce([ones]).wait(limit)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise _not_connected(place, "gloo", str(error).splitlines()[0]) from error
    assert int(ones) == place.world_size


def try_groups(mesh: Mesh, place: Place, cards: Sequence[Card], seconds: float) -> None:
    """Sum a number over each group of the mesh; with several hosts, rank 0 says how fast 1 MiB is summed over them.

    Raises LaunchError naming the group and its time limit where one does not answer."""
    groups: dict[int, Axis] = {}
    for axis in (mesh.world, mesh.tp, mesh.cp, mesh.replicas, mesh.dp, mesh.pp, mesh.ep):
        if axis.group is not None and axis.size > 1:
            groups.setdefault(id(axis.group), axis)
    for axis in groups.values():
        _sum(axis, torch.ones(1, device=mesh.device), place, seconds)
    hosts = len({card.host for card in cards})
    if hosts > 1:
        _tell_speed(mesh, place, hosts, seconds)


def _tell_speed(mesh: Mesh, place: Place, hosts: int, seconds: float) -> None:
    data = torch.zeros(_MEBIBYTE // 4, device=mesh.device)
    best = min(_sum(mesh.world, data, place, seconds) for _ in range(_TRIES))
    share = 2 * (mesh.world.size - 1) / mesh.world.size  # of the data, what each rank sends in a ring
    logger.info(
        f"all-reduce of 1 MiB over {mesh.world.size} ranks on {hosts} hosts: {best * 1000:.1f} ms "
        f"({share * _MEBIBYTE / best / 1e9:.2f} GB/s per rank)"
    )


def _sum(axis: Axis, data: torch.Tensor, place: Place, seconds: float) -> float:
    """All-reduce the data in place; return the seconds it took. Raises LaunchError after the time limit."""
    begin, group = time.perf_counter(), f"the {axis.name} group of {axis.size} ranks"
    try:
        work = dist.all_reduce(data, group=axis.group, async_op=True)
        while not work.is_completed():
            if time.perf_counter() - begin > seconds:
                raise _not_connected(place, group, f"no sum after {seconds:.0f} s")
            time.sleep(0)
        work.wait()
    except RuntimeError as error:
        raise _not_connected(place, group, str(error).splitlines()[0]) from error
    if data.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _not_connected(place: Place, what: str, why: str) -> LaunchError:
    shown = ", ".join(f"{name} {address}" for name, address in interfaces().items())
    chosen = os.environ.get(GLOO)
    return LaunchError(
        Problem(
            f"rank {place.rank} on {place.host}",
            f"cannot speak with the other ranks through {what}: {why}. This host has {shown}"
            + (f"; {GLOO} = {chosen}." if chosen else "."),
            f"Set {GLOO} and NCCL_SOCKET_IFNAME to the interface that reaches the other hosts, on every host, and see "
            "that no firewall stands between them: ranks connect to each other at any port.",
        )
    )
