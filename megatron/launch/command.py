"""From the launcher's keys and this machine to what will run: environments of local ranks, or DeepSpeed's runner.

On one machine deepy.py starts the ranks itself. On several, DeepSpeed's runner does, over pdsh, Open MPI,
MVAPICH or Slurm; every worker gets the config as one payload, and the variables it needs, as arguments.
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from megatron.config.schema.run import LauncherConfig
from megatron.errors import LaunchError, Problem
from megatron.launch.devices import usable_cores, visible_gpus
from megatron.launch.hosts import Host, hostfile_path, read_hostfile, select
from megatron.launch.place import Place
from megatron.launch.port import VARIABLE, free_port, port_of
from megatron.launch.prelude import ENVIRONMENT_FLAG, PAYLOAD_FLAG

# Variables that change how torch, its collectives or our messages behave, and so must be alike on all machines.
_FORWARDED = re.compile(
    r"(DS_|NCCL_|GLOO_|OMP_|MKL_|TORCH_|PYTORCH_|HF_|WANDB_|COMET_|TOKENIZERS_|TRITON_|FI_)\w*|LOGLEVEL|DEEPY_LAUNCH_TIME"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL")


@dataclass(frozen=True)
class Layout:
    """Where the ranks run.

    hosts: the machines with their slots; one entry named "localhost" where we start the ranks ourselves.
    gpus: this machine's GPUs that local ranks use, as CUDA_VISIBLE_DEVICES names them; empty on CPU.
    hostfile: the file the hosts come from, or None.
    uses_runner: DeepSpeed's runner starts the workers.
    """

    hosts: tuple[Host, ...]
    gpus: tuple[str, ...] = ()
    hostfile: str | None = None
    uses_runner: bool = False

    @property
    def world_size(self) -> int:
        """The number of ranks on all hosts."""
        return sum(len(host.slots) for host in self.hosts)


def find_layout(launcher: LauncherConfig, environ: Mapping[str, str]) -> Layout:
    """Return where the ranks will run.

    Without a hostfile: this machine, with num_gpus ranks, or one per visible GPU, or one on the CPU.
    Raises LaunchError where the hostfile, the filters or the number of GPUs cannot be met.
    """
    path = hostfile_path(launcher.hostfile, environ)
    through_scheduler = launcher.launcher != "pdsh"
    if path is None:
        if through_scheduler or launcher.force_multi:
            raise _needs_hostfile(launcher)
        return _local_layout(launcher, environ)
    hosts = select(read_hostfile(path), launcher.include, launcher.exclude, launcher.num_nodes, launcher.num_gpus)
    if len(hosts) > 1 or launcher.force_multi or through_scheduler or not _is_this_machine(hosts[0].name):
        _require_expressible(launcher)
        return Layout(tuple(hosts), hostfile=path, uses_runner=True)
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
            "needs a hostfile that names the machines.",
            "Set hostfile to a file with one line `name slots=8` for each machine; or start the workers without us: "
            "srun --ntasks-per-node=8 python train.py configs/125M.yml",
        )
    )


def _require_expressible(launcher: LauncherConfig) -> None:
    """Raise LaunchError for filters that DeepSpeed's MPI runners refuse."""
    filters = [launcher.include, launcher.exclude, launcher.num_gpus, launcher.num_nodes > 0]
    if launcher.launcher in ("openmpi", "mvapich") and any(filters):
        raise LaunchError(
            Problem(
                f"launcher = {launcher.launcher}",
                "cannot be combined with include, exclude, num_nodes or num_gpus.",
                "Write a hostfile that holds just the machines and slots to use.",
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


def runner_command(
    layout: Layout, launcher: LauncherConfig, script: str, payload: str, environ: Mapping[str, str]
) -> list[str]:
    """Return the argument list of DeepSpeed's runner that starts `script` with the payload on all hosts.

    No secret is in it: WANDB_API_KEY and its like stay out, since other users can read a command line.
    """
    address = environ.get("MASTER_ADDR") or launcher.master_addr
    words = [sys.executable, "-m", "deepspeed.launcher.runner", f"--launcher={launcher.launcher}"]
    words += [f"--hostfile={layout.hostfile}", f"--master_port={launcher.master_port}", "--force_multi"]
    words += [f"--include={launcher.include}"] if launcher.include else []
    words += [f"--exclude={launcher.exclude}"] if launcher.exclude else []
    words += [f"--num_nodes={launcher.num_nodes}"] if launcher.num_nodes > 0 else []
    words += [f"--num_gpus={launcher.num_gpus}"] if launcher.num_gpus else []
    words += ["--no_ssh_check"] if launcher.no_ssh_check else []
    words += ["--no_local_rank"] if launcher.launcher == "pdsh" else []
    through_mpi = launcher.launcher in ("openmpi", "mvapich", "slurm")
    words += [f"--master_addr={address or layout.hosts[0].name}"] if address or through_mpi else []
    extra = _launcher_args(launcher, environ)
    words += [f"--launcher_args={shlex.join(extra)}"] if extra else []
    words += [script, PAYLOAD_FLAG, payload]
    for key, value in _worker_variables(layout, launcher, address, environ).items():
        words += [ENVIRONMENT_FLAG, f"{key}={quote(value, safe='/:.,+-_=@')}"]  # pdsh hands it to a shell
    return words


def _launcher_args(launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """Return what srun or mpirun is told besides; Open MPI takes secrets from its own environment, by name only."""
    if launcher.launcher == "slurm":
        comment = ["--comment", launcher.comment] if launcher.comment else []
        return comment + (["--account", launcher.account] if launcher.account else [])
    if launcher.launcher == "openmpi":
        return [word for key in sorted(environ) if _is_secret(key) for word in ("-x", key)]
    return []


def _worker_variables(
    layout: Layout, launcher: LauncherConfig, address: str | None, environ: Mapping[str, str]
) -> dict[str, str]:
    chosen = {k: v for k, v in environ.items() if _FORWARDED.fullmatch(k) and not _SECRET.search(k)}
    if launcher.launcher != "pdsh":
        chosen["MASTER_ADDR"] = address or layout.hosts[0].name
        chosen["MASTER_PORT"] = str(launcher.master_port)
    return chosen


def _is_secret(name: str) -> bool:
    return bool(_FORWARDED.fullmatch(name) and _SECRET.search(name))


def unsent_secrets(launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """Return the secrets of this environment that workers on other hosts will not see, because only a command line
    could carry them there. Slurm and Open MPI hand the environment over themselves."""
    return [] if launcher.launcher in ("slurm", "openmpi") else sorted(filter(_is_secret, environ))
