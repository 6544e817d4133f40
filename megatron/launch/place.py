"""Where a process stands in the run, from whichever launcher's variables are there.

Understood, in this order: RANK/WORLD_SIZE (ours, torchrun, DeepSpeed's), Slurm (SLURM_PROCID), Open MPI
(OMPI_COMM_WORLD_RANK), MVAPICH (MV2_COMM_WORLD_RANK), MPICH and Intel MPI (PMI_RANK); and nothing: one process.
"""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.errors import LaunchError, Problem

_UNKNOWN = "this launcher starts processes, but does not say where the first one listens."
# (rank, world size, local rank, local size) by launcher. DeepSpeed's own launcher sets LOCAL_SIZE.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Place:
    """A process's place: global and local rank, the sizes, and where rank 0 listens ("" and 0: not known yet)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0
    host: str = field(default_factory=socket.gethostname)

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

        Raises LaunchError where several machines take part and nothing names the first."""
        address = self.master_addr or address
        if not address and self.local_world_size < self.world_size:
            raise LaunchError(
                Problem(
                    "MASTER_ADDR is not set", _UNKNOWN, "Set MASTER_ADDR to the name or address of the first machine."
                )
            )
        return dataclasses.replace(self, master_addr=address or "127.0.0.1", master_port=self.master_port or port)

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
    names = next((names for names in _VARIABLES if _is_set(names, environ)), None)
    if names is None:
        return Place()
    rank, world_size = _number(environ, names[0]), _number(environ, names[1])
    if not 0 <= rank < world_size:
        raise LaunchError(
            Problem(
                f"{names[0]} = {rank}, {names[1]} = {world_size}",
                "a rank counts from 0 and is less than the number of processes.",
                f"Unset {names[0]} to run a single process, or set both as the launcher should.",
            )
        )
    local_rank = _optional(environ, names[2], "LOCAL_RANK")
    local_size = _optional(environ, names[3], "LOCAL_SIZE")
    if local_rank is None:
        local_rank = rank % local_size if local_size else rank
    if local_size is None:
        local_size = world_size
    port = _optional(environ, "MASTER_PORT") or 0
    return Place(rank, world_size, local_rank, local_size, _master_address(environ), port)


def _is_set(names: tuple[str, ...], environ: Mapping[str, str]) -> bool:
    """Whether a launcher's variables are there; an interactive shell inside a Slurm job is no launched process."""
    if names[0] == "SLURM_PROCID" and environ.get("SLURM_STEP_ID") is None:
        return False
    return names[0] in environ and names[1] in environ


def _master_address(environ: Mapping[str, str]) -> str:
    """Return the address of rank 0's machine: MASTER_ADDR, else the first host of Slurm's node list, else ""."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return environ.get("MASTER_ADDR") or (first_of_node_list(nodes) if nodes else "")


def first_of_node_list(text: str) -> str:
    """Return the first host of a Slurm node list: `n[07-09,12],m1` -> `n07`."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,]*))?", text)
    if match is None:
        return text
    return match[1] + (match[2] or "") + (match[3] or "")


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
