"""The store in which the ranks of a run meet: the TCPStore of torch.distributed, so it works under every launcher and
across machines."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch.distributed as dist

from megatron.errors import LaunchError, Problem
from megatron.launch.interface import address_towards, is_loopback, why_unreachable
from megatron.launch.place import Place
from megatron.launch.port import take_inherited
from megatron.launch.preflight import QUIET_SECONDS, tell_waiting


def open_store(place: Place, seconds: float) -> dist.Store:
    """Return the store of the run, which rank 0 (or torchrun) holds; the environment says where, as `place` does.

    Rank 0 serves it at the socket that our launcher holds for it, where that is who started it.
    Raises LaunchError where it cannot be reached, or opened, within `seconds`."""
    inherited = take_inherited(os.environ)
    told = threading.Timer(QUIET_SECONDS, tell_waiting, ["rank 0", place])
    told.daemon = True
    told.start()
    try:
        if inherited is not None:
            return _serve(place, inherited, seconds)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun, which has started all ranks
            return next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
        return dist.TCPStore(
            place.master_addr,
            place.master_port,
            is_master=place.rank == 0,
            wait_for_workers=False,  # the preflight waits, and can name who is missing
            multi_tenant=True,
            timeout=timedelta(seconds=seconds),
        )
    except (RuntimeError, dist.DistError) as error:
        raise _no_store(place, seconds, error) from error
    finally:
        told.cancel()


def _no_store(place: Place, seconds: float, error: Exception) -> LaunchError:
    where = f"MASTER_ADDR:MASTER_PORT = {place.master_addr}:{place.master_port}"
    if place.rank == 0:
        why = f"cannot listen at {where} ({_first_line(error)})."
        fix = "Set MASTER_ADDR to an address of this machine, and master_port to a port that is free."
        return LaunchError(Problem(f"rank 0 on {place.host}", why, fix))
    reason = why_unreachable(place.master_addr, place.master_port)
    fix = "Look whether rank 0 has failed, whether that address is right, and whether its port is open and free."
    if "nobody listens" in reason:
        fix = f"Rank 0 has not started or has failed, or it is not on {place.master_addr}; look at its output."
    if is_loopback(address_towards(place.master_addr, place.master_port)):
        fix += f" The address is that of {place.host} itself: with several hosts, set MASTER_ADDR to rank 0's machine."
    why = f"found no rank 0 at {where} within {seconds:.0f} s ({reason or _first_line(error)})."
    return LaunchError(Problem(f"rank {place.rank} on {place.host}", why, fix))


def _serve(place: Place, descriptor: int, seconds: float) -> dist.Store:
    return dist.TCPStore(
        place.master_addr,
        place.master_port,
        place.world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        multi_tenant=True,
        master_listen_fd=descriptor,
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
