"""What the ranks of a run tell each other besides training: that they are there, and that one of them failed.

Both go through the TCPStore of torch.distributed, so they work under every launcher and across machines. A rank
that fails writes its report into the store; a thread in every other rank looks once a second and ends its process,
so nobody waits minutes for a collective that cannot finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron import logs
from megatron.config.schema.config import Config
from megatron.errors import LaunchError, Problem
from megatron.launch.failure import Failure
from megatron.launch.place import Place
from megatron.launch.port import take_inherited

CHECK_IN_SECONDS = 120.0
QUIET_SECONDS = 3.0
"""How long a rank waits for the others before it says so."""
_FAILURE, _COUNT, _SHOWN = "deepy/failure", "deepy/failures", "deepy/shown"
logger = logs.get_logger(__name__)


def open_store(place: Place, seconds: float = CHECK_IN_SECONDS) -> dist.Store:
    """Return the store of the run, which rank 0 (or torchrun) holds; the environment says where, as `place` does.

    Rank 0 serves it at the socket that our launcher holds for it, where that is who started it.
    Raises LaunchError where it cannot be reached, or opened, within `seconds`."""
    inherited = take_inherited(os.environ)
    told = threading.Timer(QUIET_SECONDS, _tell_waiting, ["rank 0", place])
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
            wait_for_workers=False,  # `check_in` waits, and can name who is missing
            multi_tenant=True,
            timeout=timedelta(seconds=seconds),
        )
    except (RuntimeError, dist.DistError) as error:
        where = f"{place.master_addr}:{place.master_port}"
        raise LaunchError(
            Problem(
                f"rank {place.rank} on {place.host}",
                f"found no rank 0 at MASTER_ADDR:MASTER_PORT = {where} within {seconds:.0f} s ({_first_line(error)}).",
                "Look whether rank 0 has failed, whether that address is right, and whether its port is open and free.",
            )
        ) from error
    finally:
        told.cancel()


def _tell_waiting(ranks: str, place: Place) -> None:
    """Say whom this rank waits for: rank 0 in a line, the others in a warning."""
    say = logger.info if place.rank == 0 else logger.warning
    say(f"waiting for {ranks} of {place.world_size} at {place.master_addr}:{place.master_port}")


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


def check_in(store: dist.Store, place: Place, config: Config, device: str, seconds: float = CHECK_IN_SECONDS) -> None:
    """Meet all ranks before anything is built; rank 0 prints who they are.

    seconds: how long to wait for the last rank.
    Raises LaunchError naming the ranks that did not come, or that run another torch or another config.
    """
    card = {
        "host": place.host,
        "device": device,
        "torch": torch.__version__,
        "config": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
    }
    store.set(f"deepy/card/{place.rank}", json.dumps(card))
    cards = _collect(store, place, seconds)
    _let_all_read(store, place)
    for what in ("torch", "config"):
        _require_equal(what, [card[what] for card in cards], [card["host"] for card in cards])
    hosts = sorted({card["host"] for card in cards})
    devices = sorted({card["device"] for card in cards})
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    logger.info(f"{place.world_size} processes on {len(hosts)} host{'s'[: len(hosts) > 1]} ({shown}): {devices[0]}")


def _collect(store: dist.Store, place: Place, seconds: float) -> list[dict[str, str]]:
    world_size, begin, is_told = place.world_size, time.monotonic(), place.rank > 0
    keys = [f"deepy/card/{rank}" for rank in range(world_size)]
    present: set[int] = set()
    while True:
        present |= {rank for rank in range(world_size) if rank not in present and store.check([keys[rank]])}
        if len(present) == world_size:
            return [json.loads(store.get(key)) for key in keys]
        missing, waited = _ranges(set(range(world_size)) - present), time.monotonic() - begin
        if waited > seconds:
            known = sorted({json.loads(store.get(keys[rank]))["host"] for rank in present})
            raise LaunchError(
                Problem(
                    f"{missing} of {world_size}",
                    f"did not come within {seconds:.0f} s; the others are on {', '.join(known)}.",
                    "Look at the output of the missing ranks; can their machines reach MASTER_ADDR:MASTER_PORT?",
                )
            )
        if waited > QUIET_SECONDS and not is_told:
            is_told = True
            _tell_waiting(missing, place)
        time.sleep(0.02)


def _let_all_read(store: dist.Store, place: Place) -> None:
    """Keep rank 0, which holds the store, until the others have read the cards, so that all see the same problem."""
    read, deadline = store.add("deepy/read", 1), time.monotonic() + 10
    while place.rank == 0 and read < place.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
        read = store.add("deepy/read", 0)


def _require_equal(what: str, values: list[str], hosts: list[str]) -> None:
    if len(set(values)) == 1:
        return
    odd = next(rank for rank, value in enumerate(values) if value != values[0])
    raise LaunchError(
        Problem(
            f"{what} of rank {odd} on {hosts[odd]} is {values[odd]}",
            f"but rank 0 on {hosts[0]} has {values[0]}.",
            "Start all ranks from the same installation with the same files.",
        )
    )


def _ranges(ranks: set[int]) -> str:
    """Return ranks briefly: {0, 1, 2, 5} -> `ranks 0-2, 5`."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and pieces[-1][-1] == rank - 1:
            pieces[-1].append(rank)
        else:
            pieces.append([rank])
    listed = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in pieces)
    return f"rank{'s'[: len(ranks) > 1]} {listed}"


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
