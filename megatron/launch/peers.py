"""What the ranks of a run tell each other besides training: that they are there, and that one of them failed.

Both go through the TCPStore of torch.distributed, so they work under every launcher and across machines. A rank
that fails writes its report into the store; a thread in every other rank looks once a second and ends its process,
so nobody waits minutes for a collective that cannot finish.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megatron.errors import LaunchError, Problem
from megatron.launch.failure import Failure
from megatron.launch.interface import address_towards, is_loopback, why_unreachable
from megatron.launch.place import Place
from megatron.launch.port import take_inherited
from megatron.launch.preflight import QUIET_SECONDS, tell_waiting

_FAILURE, _COUNT, _SHOWN = "deepy/failure", "deepy/failures", "deepy/shown"


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


class PeerWatch:
    """Ends this process when another rank fails, and tells the others when this one does.

    It has a connection of its own: the store that torch.distributed uses may be locked by a waiting collective.
    """

    def __init__(self, place: Place, interval: float = 1.0) -> None:
        self.place, self.interval = place, interval
        self._store = dist.TCPStore(
            place.master_addr,
            place.master_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peer-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no longer; called before the ranks part in good order."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def announce(self, failure: Failure) -> bool:
        """Tell the others; return whether this rank is the first to fail, and so the one whose report is shown.

        The others say that they leave, but stay until `release`: a launcher that sees one rank end kills the rest, and
        would cut the report off.
        """
        self._stopped.set()
        if failure.is_echo:
            time.sleep(2 * self.interval)  # the rank that caused it may be on its way to the store
        try:
            if self._store.add(_COUNT, 1) > 1:
                self._wait_until_shown()
                return False
            self._store.set(_FAILURE, failure.to_json())
            time.sleep(1.5 * self.interval)
        except (RuntimeError, dist.DistError):
            return not failure.is_echo
        return True

    def release(self) -> None:
        """Let the others end: the report of this rank is shown."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(_SHOWN, "1")
            time.sleep(0.5 * self.interval)  # rank 0 keeps the store open until they have seen it

    def _wait_until_shown(self) -> None:
        deadline = time.monotonic() + 10 * self.interval
        while time.monotonic() < deadline and not self._store.check([_SHOWN]):
            time.sleep(0.1 * self.interval)

    def _look(self) -> None:
        while not self._stopped.wait(self.interval):
            try:
                if not self._store.check([_FAILURE]):
                    continue
                failure = Failure.from_json(self._store.get(_FAILURE).decode())
            except (RuntimeError, dist.DistError):
                self._say("the process that holds the run together (rank 0 or its launcher) is gone")
                os._exit(1)
            if not self._stopped.is_set():
                self._say(f"rank {failure.rank} on host {failure.host} failed")
                with contextlib.suppress(RuntimeError, dist.DistError):
                    self._wait_until_shown()
                os._exit(1)

    def _say(self, reason: str) -> None:
        if not self._stopped.is_set():
            line = f"rank {self.place.rank} on host {self.place.host} ends because {reason}."
            print(line, file=sys.stderr, flush=True)
