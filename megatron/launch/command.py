"""From the launcher's keys and this machine to where ranks will run, and the environments of those on this machine.

On one machine deepy.py starts the ranks itself. On several, pdsh, an MPI's launcher or Slurm does (`launch/remote.py`).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.schema.run import LauncherConfig
from megatron.errors import LaunchError, Problem
from megatron.launch.devices import usable_cores, visible_gpus
from megatron.launch.hosts import Host, hostfile_path, read_hostfile, select
from megatron.launch.place import Place
from megatron.launch.port import VARIABLE, free_port, port_of
from megatron.launch.slurm import allocated_hosts


@dataclass(frozen=True)
class Layout:
    """Where the ranks run.

    hosts: the machines with their slots; one entry named "localhost" where we start the ranks ourselves.
    gpus: this machine's GPUs that local ranks use, as CUDA_VISIBLE_DEVICES names them; empty on CPU.
    hostfile: the file the hosts come from, or None.
    is_remote: another launcher starts the ranks, on these hosts.
    """

    hosts: tuple[Host, ...]
    gpus: tuple[str, ...] = ()
    hostfile: str | None = None
    is_remote: bool = False

    @property
    def world_size(self) -> int:
        """The number of ranks on all hosts."""
        return sum(len(host.slots) for host in self.hosts)


def find_layout(launcher: LauncherConfig, environ: Mapping[str, str]) -> Layout:
    """Return where the ranks will run.

    Without a hostfile: under `launcher: slurm` the nodes of the job that we are in; else this machine, with num_gpus
    ranks, or one per visible GPU, or one on the CPU.
    Raises LaunchError where the hostfile, the filters or the number of GPUs cannot be met.
    """
    path = hostfile_path(launcher.hostfile, environ)
    through_scheduler = launcher.launcher != "pdsh"
    if path is not None:
        known = read_hostfile(path)
    else:
        known = allocated_hosts(environ) if launcher.launcher == "slurm" else []
    if not known:
        if through_scheduler or launcher.force_multi:
            raise _needs_hostfile(launcher)
        return _local_layout(launcher, environ)
    hosts = select(known, launcher.include, launcher.exclude, launcher.num_nodes, launcher.num_gpus)
    if len(hosts) > 1 or launcher.force_multi or through_scheduler or not _is_this_machine(hosts[0].name):
        return Layout(tuple(hosts), hostfile=path, is_remote=True)
    return _on_this_machine(hosts[0].slots, environ, path)


def single_layout(environ: Mapping[str, str], count: int = 1) -> Layout:
    """Return the layout of `count` processes on this machine, whatever hostfile there is."""
    return _on_this_machine(tuple(range(count)), environ)


def _local_layout(launcher: LauncherConfig, environ: Mapping[str, str]) -> Layout:
    if launcher.include or launcher.exclude:
        here = [Host("localhost", tuple(range(max(1, len(visible_gpus(environ))))))]
        return _on_this_machine(select(here, launcher.include, launcher.exclude)[0].slots, environ)
    gpus = visible_gpus(environ)
    count = launcher.num_gpus or max(1, len(gpus))
    return _on_this_machine(tuple(range(count)), environ)


def _on_this_machine(slots: tuple[int, ...], environ: Mapping[str, str], hostfile: str | None = None) -> Layout:
    gpus = visible_gpus(environ)
    if gpus and max(slots) >= len(gpus):
        raise LaunchError(
            Problem(
                f"{len(slots)} processes, the last on GPU {max(slots)}",
                f"but this machine shows {len(gpus)} GPU{'s'[: len(gpus) > 1]}.",
                f"Set num_gpus to {len(gpus)} or less, or DS_ACCELERATOR=cpu to run on the CPU.",
            )
        )
    host = Host("localhost", slots)
    return Layout((host,), tuple(gpus[slot] for slot in slots) if gpus else (), hostfile)


def _is_this_machine(name: str) -> bool:
    return name in {"localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0]}


def _needs_hostfile(launcher: LauncherConfig) -> LaunchError:
    return LaunchError(
        Problem(
            f"launcher = {launcher.launcher}, force_multi = {launcher.force_multi}",
            "needs a hostfile that names the machines"
            + (", or a job of Slurm around it (salloc, sbatch)." if launcher.launcher == "slurm" else "."),
            "Set hostfile to a file with one line `name slots=8` for each machine; or start the workers without us: "
            "srun --ntasks-per-node=8 python train.py configs/125M.yml",
        )
    )


def local_environments(
    layout: Layout, launcher: LauncherConfig, environ: Mapping[str, str], held: socket.socket | None = None
) -> list[dict[str, str]]:
    """Return the variables of each rank on this machine.

    held: listens where the ranks will meet, for rank 0 to inherit; None names a port without holding it, master_port
        if it is free."""
    count = layout.world_size
    port = free_port(launcher.master_port) if held is None else port_of(held)
    shared = {"DS_ACCELERATOR": environ.get("DS_ACCELERATOR", "cuda" if layout.gpus else "cpu")}
    if layout.gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(layout.gpus)
    if "OMP_NUM_THREADS" not in environ:
        shared["OMP_NUM_THREADS"] = str(max(1, usable_cores() // count))
    ranks = [{**Place(rank, count, rank, count, "127.0.0.1", port).environment(), **shared} for rank in range(count)]
    if held is not None:
        ranks[0][VARIABLE] = str(held.fileno())
    return ranks
