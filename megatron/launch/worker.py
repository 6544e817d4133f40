"""From a place in the run to a Mesh: device, threads, process group, logs, and the meeting of all ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron import logs, whereabouts
from megatron.config.schema.config import Config
from megatron.launch import flight
from megatron.launch.board import VARIABLE, Board
from megatron.launch.connections import choose_interface, try_gloo, try_groups
from megatron.launch.devices import usable_cores
from megatron.launch.failure import Failure
from megatron.launch.peers import open_store
from megatron.launch.place import Place, slot_variables
from megatron.launch.preflight import Card, check_in, count_local, expected_hosts, write_card
from megatron.launch.watch import PeerWatch
from megatron.malloc import keep_freed_memory
from megatron.parallel.mesh import Mesh
from megatron.whereabouts import Phase

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
logger = logs.get_logger(__name__)


@dataclass
class Worker:
    """This process as a member of the run. board: the launcher's, where it is ours; watch: where it is not."""

    place: Place
    mesh: Mesh
    board: Board | None = None
    watch: PeerWatch | None = None

    def finish(self) -> None:
        """Part from the other ranks in good order."""
        whereabouts.enter(Phase.END)
        if dist.is_initialized() and self.place.world_size > 1:
            dist.barrier()
        if self.watch is not None:
            self.watch.finish()
        if dist.is_initialized():
            dist.destroy_process_group()


def find_board(environ: Mapping[str, str]) -> Board | None:
    """Return the board of the launcher that supervises this process, or None where another launcher does."""
    folder = environ.get(VARIABLE)
    return Board(Path(folder)) if folder and Path(folder).is_dir() else None


def start_worker(config: Config, place: Place, board: Board | None = None, watch: PeerWatch | None = None) -> Worker:
    """Join the run: choose the device, open the process group, meet the other ranks, and build the mesh.

    board: where the launcher on this machine looks for positions and failures; watch: what does that under another one.
    Raises LaunchError where ranks are missing or differ, or the layout does not fit the number of processes.
    """
    parallel = config.parallel
    sizes = parallel.model_parallel_size, max(1, parallel.pipe_parallel_size), parallel.context_parallel_size
    return _join(config, place, board, watch, sizes)


def decoding_worker(config: Config, place: Place, board: Board | None = None, watch: PeerWatch | None = None) -> Worker:
    """Join the processes that share a model to generate text: all of them, on the tensor axis.

    A single one needs no torch.distributed. Raises as `start_worker` does."""
    if place.world_size > 1:
        worker = _join(config, place, board, watch, (place.world_size, 1, 1))
        if place.rank > 0:  # they do the same as rank 0, and would say the same
            logs.setup(place.rank, level="ERROR")
        return worker
    device = _prepare(place)
    logger.info(f"1 process on {place.host}: {_device_name(device)}")
    return Worker(place, Mesh.single(device), board)


def _join(
    config: Config, place: Place, board: Board | None, watch: PeerWatch | None, sizes: tuple[int, int, int]
) -> Worker:
    """Return the worker of a mesh with these sizes of the tensor, pipeline and context axes."""
    seconds, expected = config.launcher.check_in_seconds, expected_hosts(place.world_size, os.environ)
    store: dist.Store | None = None
    if place.world_size > 1:
        logs.setup(place.rank, place.describe())
        whereabouts.enter(Phase.MEETING)
        store = open_store(place, seconds)
        place = count_local(store, place, seconds, expected)
    os.environ.update({**place.environment(), **slot_variables(place, os.environ)})
    if watch is not None:
        watch.connect(store, place.master_addr)
    if config.kernels.compile is True:
        _keep_compiled_code()
    device = _prepare(place)
    watcher = board or watch
    if device.type == "cuda" and watcher is not None:
        flight.record(watcher.folder, os.environ)
    cards = _meet(store, place, config, device, expected) if store is not None else []
    _connect(config, store, place, device)
    mesh = Mesh.create(*sizes, device)
    if cards:
        try_groups(mesh, place, cards, seconds)
    logs.setup(place.rank, f"{mesh.describe()} host {place.host}" if place.world_size > 1 else "")
    return Worker(place, mesh, board, watch)


def _keep_compiled_code() -> None:
    """Let torch.compile keep its code where further runs find it: by default it is lost with the temporary folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepy" / "compiled"
    with suppress(OSError):  # where nothing can be written torch's own folder serves
        cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def _prepare(place: Place) -> torch.device:
    """Settle logs, warnings, device and threads."""
    logs.setup(place.rank, place.describe())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")
    device = _choose_device(place)
    keep_freed_memory(device.type)
    if "OMP_NUM_THREADS" not in os.environ and device.type == "cpu":
        torch.set_num_threads(max(1, usable_cores() // place.local_world_size))
    return device


def report(failure: Failure, board: Board | None, watch: PeerWatch | None) -> bool:
    """Pass a failure on to whoever shows it; return whether this process must print it itself."""
    if board is not None:
        board.post(failure.rank, failure)
        return False
    return watch.announce(failure) if watch is not None else True


def _choose_device(place: Place) -> torch.device:
    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _meet(store: dist.Store, place: Place, config: Config, device: torch.device, expected: Sequence[str]) -> list[Card]:
    """Return the cards of all ranks, which are there, alike, and connected to each other."""
    seconds, card = config.launcher.check_in_seconds, write_card(place, config, device, _device_name(device))
    cards = check_in(store, place, config, card, seconds, expected)
    choose_interface(place, cards)
    try_gloo(store, place, seconds)
    return cards


def _connect(config: Config, store: dist.Store | None, place: Place, device: torch.device) -> None:
    """Open the process group."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if store is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        logger.info(f"1 process on {place.host}: {_device_name(device)}")
        return
    # Long, because one rank may build a data index while the others wait; a run that hangs is ended before.
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(minutes=3 * (config.launcher.hang_timeout_minutes or 0)))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (nccl)"
    return f"CPU, {torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]} each (gloo)"
