"""Which machines take part, from a hostfile of lines `name slots=8` and the filters of the config."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import LaunchError, Problem

DEFAULT_HOSTFILE = "/job/hostfile"
CONNECT_SECONDS = 10
HOSTS_VARIABLE = "DEEPY_HOSTS"
"""Tells workers which hosts take part, rank after rank: `n1:0,1;n2:0,1`."""
# What is started for each launcher: its programs by any of their names, and the package of Debian and Ubuntu.
_PROGRAMS = {
    "pdsh": ((("pdsh",), "pdsh"), (("ssh",), "openssh-client")),
    "openmpi": ((("mpirun.openmpi", "mpirun"), "openmpi-bin"),),
    "mpich": ((("mpiexec.hydra", "mpirun.mpich", "mpiexec"), "mpich"),),
    "mvapich": ((("mpiexec.hydra", "mpiexec", "mpirun"), "mvapich2"),),
    "slurm": ((("srun",), "slurm-client"),),
}
# Words of the version of MPI's programs, which go by the same names.
_MPI_VERSIONS = {"openmpi": ("open mpi", "openrte", "open-mpi"), "mpich": ("hydra",), "mvapich": ("hydra",)}


@dataclass(frozen=True)
class Host:
    """A machine and the numbers of its devices that take part."""

    name: str
    slots: tuple[int, ...]


def describe_hosts(hosts: Sequence[Host]) -> str:
    """Return hosts and slots as one word, `n1:0,1;n2:0,1`."""
    return ";".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in hosts)


def parse_hosts(text: str) -> list[Host]:
    """Return the hosts that `describe_hosts` made the word of."""
    pairs = [part.rpartition(":") for part in text.split(";")]
    return [Host(name, tuple(map(int, slots.split(",")))) for name, _, slots in pairs]


def hostfile_path(configured: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the hostfile to read: the config's, else the environment's DLTS_HOSTFILE, else /job/hostfile if there."""
    if configured:
        return configured
    if environ.get("DLTS_HOSTFILE"):
        return environ["DLTS_HOSTFILE"]
    return DEFAULT_HOSTFILE if Path(DEFAULT_HOSTFILE).is_file() else None


def read_hostfile(path: str) -> list[Host]:
    """Return the hosts of a hostfile in its order.

    Raises LaunchError where it is missing, empty, has a line of another form, or names a host twice."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        raise LaunchError(
            Problem(
                f"hostfile = {path}",
                f"cannot be read ({error.strerror}).",
                "Write one line `name slots=8` for each machine, or remove the key to run on this machine alone.",
            )
        ) from error
    problems, hosts = [], {}
    for number, text in enumerate(lines, start=1):
        line = text.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)(?:\s+max[-_]slots\s*=\s*\d+)?", line)
        if match is None or int(match[2]) == 0:
            problems.append(
                Problem(line, "is not a host with its number of devices.", "Write `name slots=8`.", f"{path}:{number}")
            )
        elif match[1] in hosts:
            problems.append(Problem(line, "names the host a second time.", "Keep one line.", f"{path}:{number}"))
        else:
            hosts[match[1]] = Host(match[1], tuple(range(int(match[2]))))
    if not hosts and not problems:
        problems.append(Problem("hostfile", "names no host.", "Write one line `name slots=8` for each machine.", path))
    if problems:
        raise LaunchError(*problems)
    return list(hosts.values())


def select(
    hosts: list[Host], include: str | None, exclude: str | None, num_nodes: int = -1, num_gpus: int | None = None
) -> list[Host]:
    """Return the hosts and slots that remain after the filters.

    include, exclude: `host@host:0,2`; a host without slots means all of them. At most one of the two, and neither
    together with num_nodes (the first N hosts; -1 for all) or num_gpus (slots 0 to N - 1 of each host; None for all).
    Raises LaunchError for a host or slot that the hostfile lacks, or where nothing remains.
    """
    counted = num_nodes > 0 or bool(num_gpus)
    if (include and exclude) or ((include or exclude) and counted):
        raise LaunchError(
            Problem(
                f"include = {include}, exclude = {exclude}, num_nodes = {num_nodes}, num_gpus = {num_gpus}",
                "are two ways to choose devices.",
                "Keep one: include, or exclude, or num_nodes with num_gpus.",
            )
        )
    wanted = _parse_filter(include or exclude or "", {host.name: host for host in hosts})
    chosen = []
    for host in hosts:
        named = wanted.get(host.name, ())
        slots = named if include else tuple(slot for slot in host.slots if slot not in named)
        if num_gpus:
            slots = _first_slots(host, num_gpus)
        if slots:
            chosen.append(Host(host.name, slots))
    chosen = chosen[:num_nodes] if num_nodes > 0 else chosen
    if not chosen or len(chosen) < num_nodes:
        raise LaunchError(
            Problem(
                f"include = {include}, exclude = {exclude}, num_nodes = {num_nodes}",
                f"leaves {len(chosen)} of the {len(hosts)} hosts of the hostfile.",
                f"The hosts are: {', '.join(host.name for host in hosts)}.",
            )
        )
    return chosen


def _first_slots(host: Host, num_gpus: int) -> tuple[int, ...]:
    if num_gpus > len(host.slots):
        raise LaunchError(
            Problem(
                f"num_gpus = {num_gpus}",
                f"is more than the {len(host.slots)} slots of {host.name}.",
                f"Set num_gpus to {len(host.slots)} or less, or correct the hostfile.",
            )
        )
    return host.slots[:num_gpus]


def _parse_filter(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    """Return the slots that `host@host:0,2` names, by host."""
    named: dict[str, tuple[int, ...]] = {}
    for part in filter(None, (piece.strip() for piece in text.split("@"))):
        name, _, numbers = part.partition(":")
        if name not in hosts or not re.fullmatch(r"(\d+(,\d+)*)?", numbers.replace(" ", "")):
            raise LaunchError(
                Problem(
                    part,
                    f"is not a host of the hostfile ({', '.join(hosts)}) with slots.",
                    "Write `host@host:0,2`.",
                )
            )
        slots = tuple(sorted({int(n) for n in numbers.split(",")})) if numbers else hosts[name].slots
        absent = [slot for slot in slots if slot not in hosts[name].slots]
        if absent:
            raise LaunchError(
                Problem(part, f"{name} has the slots {hosts[name].slots}, not {absent}.", "Name slots that it has.")
            )
        named[name] = tuple(sorted({*named.get(name, ()), *slots}))
    return named


def require_reachable(hosts: Sequence[Host], launcher: str, checks_ssh: bool = True) -> None:
    """Raise LaunchError naming every program that the launcher needs and this machine lacks, and every host that ssh
    cannot log into without a password.

    launcher: pdsh, openmpi, mpich, mvapich or slurm; ssh is tried for pdsh only. checks_ssh: False under no_ssh_check.
    """
    problems = [
        Problem(
            f"launcher = {launcher}",
            f"the program {names[0]} is not installed on this machine.",
            f"Install it (apt-get install {package}), or start the ranks yourself with torchrun on each host.",
        )
        for names, package in _PROGRAMS[launcher]
        if not any(map(shutil.which, names))
    ]
    if not problems and launcher in _MPI_VERSIONS:
        problems = _other_mpi(launcher)
    if not problems and launcher == "pdsh" and checks_ssh:
        problems = _unreachable(hosts)
    if problems:
        raise LaunchError(*problems)


def program_of(launcher: str) -> str:
    """Return the name of a launcher's program here: the most telling one that is installed."""
    names = _PROGRAMS[launcher][0][0]
    return next((name for name in names if shutil.which(name)), names[-1])


def _other_mpi(launcher: str) -> list[Problem]:
    """Return a problem where the program belongs to another MPI, whose options are others."""
    program = program_of(launcher)
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    text = said.stdout + said.stderr
    kinds = [kind for kind, words in _MPI_VERSIONS.items() if any(word in text.lower() for word in words)]
    if not kinds or launcher in kinds:
        return []
    why = f"but {shutil.which(program)} is another MPI's ({text.strip().splitlines()[0]})."
    return [Problem(f"launcher = {launcher}", why, f"Set launcher to {kinds[0]}, or put the right one first in PATH.")]


def _unreachable(hosts: Sequence[Host]) -> list[Problem]:
    """Return a problem for each host that ssh cannot log into; all are tried at once."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    tries = [
        subprocess.Popen(
            ["ssh", *options, host.name, "true"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        for host in hosts
    ]
    fix = "Make `ssh {0} true` work without a password, correct the hostfile, or set exclude: {0}"
    problems = []
    for host, attempt in zip(hosts, tries, strict=True):
        said = attempt.communicate()[1].strip().splitlines()
        if attempt.returncode:
            why = f"ssh cannot log into it ({said[-1] if said else f'exit code {attempt.returncode}'})."
            problems.append(Problem(f"host {host.name}", why, fix.format(host.name)))
    return problems
