"""Where a process stands in the run, from whichever launcher's variables are there.

Understood, in this order: RANK/WORLD_SIZE (ours, torchrun, DeepSpeed's, containers), Open MPI (OMPI_COMM_WORLD_RANK),
MVAPICH (MV2_COMM_WORLD_RANK), MPICH and Intel MPI (PMI_RANK), Slurm (SLURM_PROCID); and nothing: one process. MPI
stands before Slurm, because mpirun inside of a Slurm job leaves Slurm's variables of another step to its ranks.
"""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron.errors import LaunchError, Problem
from megatron.launch.hosts import HOSTS_VARIABLE, parse_hosts
from megatron.launch.slurm import is_task, node_names, of_step

_UNKNOWN = "this launcher starts processes, but does not say where the first one listens."
# (rank, world size, local rank, local size) by launcher. DeepSpeed's own launcher sets LOCAL_SIZE.
_PLAIN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Place:
    """A process's place: global and local rank, the sizes, and where rank 0 listens ("" and 0: not known yet).

    is_local_known: False where nothing says how many of the ranks are on this machine; the ranks then count each other
        when they meet (`launch/peers.py`), and until then all of them are taken to be here.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0
    host: str = field(default_factory=socket.gethostname)
    is_local_known: bool = True

    def environment(self) -> dict[str, str]:
        """Return the variables by which torch.distributed and DeepSpeed know this place."""
        nodes = max(1, self.world_size // self.local_world_size)
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "LOCAL_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "CROSS_RANK": str(self.rank // self.local_world_size),
            "CROSS_SIZE": str(nodes),
        }

    def listening_at(self, address: str | None, port: int) -> Place:
        """Return the place with the config's master_addr and master_port where the environment named none.

        Raises LaunchError where several machines take part, or may do, and nothing names the first."""
        address = self.master_addr or address
        if not address and self.local_world_size < self.world_size:
            raise LaunchError(
                Problem(
                    "MASTER_ADDR is not set", _UNKNOWN, "Set MASTER_ADDR to the name or address of the first machine."
                )
            )
        return dataclasses.replace(self, master_addr=address or "127.0.0.1", master_port=self.master_port or port)

    def beside(self, hosts: Sequence[str]) -> Place:
        """Return the place with its local rank and size, counted from the host of every rank."""
        local = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        return dataclasses.replace(
            self, local_rank=local.index(self.rank), local_world_size=len(local), is_local_known=True
        )

    def among(self, count: int) -> Place:
        """Return the place among the first `count` processes; one that is not among them keeps its rank."""
        return dataclasses.replace(self, world_size=count, local_world_size=min(self.local_world_size, count))

    def describe(self) -> str:
        """Return the place for messages, such as `rank 3 host n1`; "" for a single process."""
        return f"rank {self.rank} host {self.host}" if self.world_size > 1 else ""


def find_place(environ: Mapping[str, str]) -> Place:
    """Return the place that the environment describes; one process where it describes none.

    Raises LaunchError where the variables contradict each other.
    """
    environ = of_step(environ)
    names = _require_agreement(environ)
    if names is None:
        return Place()
    rank, world_size = _rank_and_size(names, environ)
    local_rank = _optional(environ, names[2], "LOCAL_RANK")
    local_size = _optional(environ, names[3], "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    is_known = local_rank is not None or (local_size is not None and local_size > 0) or world_size == 1
    if local_rank is None:
        local_rank = rank % local_size if local_size else rank
    if local_size is None:
        local_size = world_size
    port = _optional(environ, "MASTER_PORT") or 0
    place = Place(rank, world_size, local_rank, local_size, _master_address(environ), port)
    is_here = place.master_addr in ("", "localhost") or place.master_addr.startswith("127.")
    return dataclasses.replace(place, is_local_known=is_known or is_here)


def slot_variables(place: Place, environ: Mapping[str, str]) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES for the slots that include or exclude left of this host, where the launcher that
    started this process knows nothing of slots (MPI's) and nobody has set it; else nothing."""
    if "CUDA_VISIBLE_DEVICES" in environ or not environ.get(HOSTS_VARIABLE):
        return {}
    hosts = parse_hosts(environ[HOSTS_VARIABLE])
    by_rank = [host for host in hosts for _ in host.slots]
    named = [host for host in hosts if host.name == environ.get("SLURMD_NODENAME")]
    host = named[0] if named else by_rank[min(place.rank, len(by_rank) - 1)]
    is_plain = host.slots == tuple(range(len(host.slots)))
    return {} if is_plain else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots))}


def _require_agreement(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the names of the variables that hold, None where there are none.

    A launcher may run inside of another, as torchrun in a Slurm step does; it says so by LOCAL_RANK. Else RANK beside
    another launcher's variables, left in a shell perhaps, would give several processes one place.
    Raises LaunchError for half a set, and for two sets of different values.
    """
    started = next((names for names in _LAUNCHERS if _is_set(names, environ)), None)
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        if started is None and "RANK" in environ:
            raise _half("RANK", "WORLD_SIZE", environ)
        if started is None and environ.get("WORLD_SIZE", "1").strip() not in ("", "1"):
            raise _half("WORLD_SIZE", "RANK", environ)
        return started
    if started is not None and "LOCAL_RANK" not in environ:
        plain, other = _rank_and_size(_PLAIN, environ), _rank_and_size(started, environ)
        if plain != other:
            raise LaunchError(
                Problem(
                    f"RANK = {plain[0]}, WORLD_SIZE = {plain[1]}",
                    f"but {started[0]} = {other[0]}, {started[1]} = {other[1]}: two launchers, two places.",
                    "Unset RANK and WORLD_SIZE (a shell's start-up file may set them); or set LOCAL_RANK too, as "
                    "torchrun does, if they are the ones that hold.",
                    "environment",
                )
            )
    return _PLAIN


def _half(present: str, absent: str, environ: Mapping[str, str]) -> LaunchError:
    return LaunchError(
        Problem(
            f"{present} = {environ[present]}",
            f"but {absent} is not set.",
            f"Set {absent} too, or unset {present} to run a single process.",
            "environment",
        )
    )


def _rank_and_size(names: tuple[str, ...], environ: Mapping[str, str]) -> tuple[int, int]:
    rank, world_size = _number(environ, names[0]), _number(environ, names[1])
    if not 0 <= rank < world_size:
        raise LaunchError(
            Problem(
                f"{names[0]} = {rank}, {names[1]} = {world_size}",
                "a rank counts from 0 and is less than the number of processes.",
                f"Unset {names[0]} to run a single process, or set both as the launcher should.",
            )
        )
    return rank, world_size


def _is_set(names: tuple[str, ...], environ: Mapping[str, str]) -> bool:
    """Whether a launcher's variables are there; an interactive shell inside a Slurm job is no launched process."""
    if names[0] == "SLURM_PROCID" and not is_task(environ):
        return False
    return names[0] in environ and names[1] in environ


def _master_address(environ: Mapping[str, str]) -> str:
    """Return the address of rank 0's machine: MASTER_ADDR, else the first host of Slurm's node list, else ""."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return environ.get("MASTER_ADDR") or (node_names(nodes)[0] if nodes else "")


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as error:
        raise LaunchError(
            Problem(f"{name} = {environ[name]}", "is not a whole number.", f"Set or unset {name}.", "environment")
        ) from error


def _optional(environ: Mapping[str, str], *names: str) -> int | None:
    """Return the first of the variables that is set; Slurm writes sizes like `2(x3)`, whose first number counts."""
    for name in names:
        if environ.get(name):
            digits = re.match(r"\d+", environ[name])
            if digits is None:
                return _number(environ, name)
            return int(digits[0])
    return None
