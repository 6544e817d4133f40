"""`./deepy.py parity CONFIG [--set KEY=VALUE]`: does this config's layout train as one process does?

The config is shrunk (`megatron.proof.shrink`), and its ranks run on this machine: on its GPUs where there are enough of
them, else as processes on the CPU, through gloo, however many they are. The table goes to standard output; the exit
code is 0 or 1.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from socket import socket

from megatron.config.schema.run import LauncherConfig
from megatron.errors import ConfigError, Problem
from megatron.launch.arguments import parse_arguments
from megatron.launch.command import Layout, local_environments
from megatron.launch.devices import visible_gpus
from megatron.launch.hosts import Host
from megatron.launch.port import hold_port
from megatron.launch.read_config import read_settings
from megatron.launch.supervise import run_ranks
from megatron.proof.shrink import Trial, shrink


def main(argv: Sequence[str]) -> int:
    """Run the trial of a config and return 0 where it passes, 1 where it does not, or the code of a rank that failed.

    Raises ConfigError for a config that cannot stand."""
    arguments = parse_arguments(list(argv), "./deepy.py parity")
    if arguments.check or arguments.show:
        raise ConfigError(Problem("command line", "parity has no --check and no --print.", "Leave the flag out."))
    config = read_settings(arguments).resolve(planning=True).config
    gpus = visible_gpus(os.environ)
    trial = shrink(config, on_cpu=False)
    if len(gpus) < trial.world_size:
        trial, gpus = shrink(config, on_cpu=True), []
    return run_trial(trial, gpus)


def run_trial(trial: Trial, gpus: Sequence[str]) -> int:
    """Fork the ranks of a trial, wait for them, and return the exit code.

    gpus: as CUDA_VISIBLE_DEVICES names them, one for each rank; empty for the CPU."""
    if not gpus:
        _run_rank()  # loads torch once, for all ranks that are forked from here; CUDA does not survive a fork
    reading, writing = os.pipe()
    with hold_port(LauncherConfig().master_port) as held:
        environments = rank_environments(trial, gpus, os.environ, held)
        code = run_ranks(lambda local_rank: _run_rank()(trial, writing), environments)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        passed = pipe.read() == b"1"
    return code or int(not passed)


def _run_rank() -> Callable[[Trial, int], int]:
    """Return what a rank does. The module is imported here, not above, because it loads torch (4 s)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_rank: Callable[[Trial, int], int] = importlib.import_module("megatron.launch.parity_rank").run_rank
    return run_rank


def rank_environments(
    trial: Trial, gpus: Sequence[str], environ: Mapping[str, str], held: socket | None = None
) -> list[dict[str, str]]:
    """Return the variables of each rank; only warnings are shown unless LOGLEVEL asks for more.

    held: as for `local_environments`."""
    layout = Layout((Host("localhost", tuple(range(trial.world_size))),), tuple(gpus[: trial.world_size]))
    ours = {"LOGLEVEL": environ.get("LOGLEVEL", "WARNING"), "DS_ACCELERATOR": "cuda" if gpus else "cpu"}
    return [{**each, **ours} for each in local_environments(layout, LauncherConfig(), environ, held)]
