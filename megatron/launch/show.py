"""`--print`: what would run, in a form to copy, and how the same ranks are started without us."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from megatron.config.schema.run import LauncherConfig
from megatron.launch.arguments import Arguments
from megatron.launch.command import Layout
from megatron.launch.hosts import Host


def show_local(script: str, arguments: Arguments, layout: Layout, environments: list[dict[str, str]]) -> str:
    """Return the command lines that start the same ranks by hand."""
    count = layout.world_size
    placed = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    shared = {key: value for key, value in environments[0].items() if key not in placed | {"CROSS_RANK", "CROSS_SIZE"}}
    words = f"{shlex.quote(script)} {arguments.command_line()}"
    python = shlex.quote(sys.executable)
    torchrun = f"{python} -m torch.distributed.run --standalone --nproc_per_node={count}"
    lines = [
        f"# {count} process{'es'[: 2 * (count > 1)]} on this machine. The same with torchrun:",
        f"{_assignments(shared)} {torchrun} {words}",
        "# The same by hand, one line for each process:",
    ]
    background = " &" if count > 1 else ""
    lines += [f"{_assignments(environment)} {python} {words}{background}" for environment in environments]
    return "\n".join(lines + (["wait"] if count > 1 else []))


def _assignments(environment: Mapping[str, str]) -> str:
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


def show_remote(command: Sequence[str], hosts: Sequence[Host], launcher: LauncherConfig, words: str) -> str:
    """Return the command of several hosts, and the ones of torchrun and srun that start the same ranks.

    words: the script and its configs, as a person writes them."""
    count = sum(len(host.slots) for host in hosts)
    lines = [f"# {count} processes on {len(hosts)} host{'s'[: len(hosts) > 1]}, by {launcher.launcher}:"]
    lines += [shlex.join(command)]
    sizes, python = {len(host.slots) for host in hosts}, shlex.quote(sys.executable)
    if len(sizes) > 1:
        return "\n".join([*lines, "# Without us: torchrun and srun want as many processes on one host as on the next."])
    size, address = sizes.pop(), launcher.master_addr or hosts[0].name.rpartition("@")[2]
    where = (
        f"--nnodes={len(hosts)} --nproc_per_node={size} --master_addr={address} --master_port={launcher.master_port}"
    )
    lines += ["# The same with torchrun, one line for each host:"]
    torchrun = f"cd {shlex.quote(os.getcwd())} && exec {python} -m torch.distributed.run {where}"
    lines += [
        f"ssh {host.name} {shlex.quote(f'{torchrun} --node_rank={number} {words}')}"
        for number, host in enumerate(hosts)
    ]
    names = ",".join(host.name for host in hosts)
    srun = f"srun --nodes={len(hosts)} --ntasks-per-node={size} --nodelist={names} {python} {words}"
    return "\n".join([*lines, "# The same with Slurm alone:", srun])
