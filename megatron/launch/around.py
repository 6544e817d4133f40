"""What `./deepy.py doctor` says of several machines: this one's network, what could start ranks, and the hosts of the
hostfile as ssh finds them."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping

from megatron.errors import LaunchError
from megatron.launch.finding import Finding
from megatron.launch.hosts import hostfile_path, read_hostfile
from megatron.launch.interface import interfaces, own_name_is_loopback
from megatron.launch.slurm import node_names

_STARTERS = ("pdsh", "mpirun.openmpi", "mpirun", "mpiexec.hydra", "srun")
_COMPARED = ("torch", "deepspeed")
SECONDS = 15.0
_ASK = (
    "import platform, importlib.metadata as m; "
    f"print(platform.python_version(), *(m.version(name) for name in {_COMPARED!r}))"
)


def other_hosts(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield this machine's network and launchers, and each host of the hostfile or the Slurm job around us."""
    shown = ", ".join(f"{name} {address}" for name, address in interfaces().items())
    yield Finding("interfaces", shown or "none")
    note = "its loopback: with several hosts, gloo is given the interface that reaches MASTER_ADDR"
    yield Finding("own name", f"{socket.gethostname()} leads to {note if own_name_is_loopback() else 'this machine'}")
    yield Finding("launchers", ", ".join(filter(shutil.which, _STARTERS)) or "none (needed with several hosts only)")
    if environ.get("SLURM_JOB_NODELIST"):
        yield Finding("Slurm job", ", ".join(node_names(environ["SLURM_JOB_NODELIST"])))
    path = hostfile_path(None, environ)
    if path is None:
        yield Finding("hostfile", "none (set DLTS_HOSTFILE to one, and its hosts are tried)")
        return
    try:
        names = [host.name for host in read_hostfile(path)]
    except LaunchError as error:
        yield Finding("hostfile", path, str(error))
        return
    yield from _try_hosts(names)


def own_versions() -> str:
    """Return what a host must answer to be like this one."""
    return " ".join([platform.python_version(), *map(importlib.metadata.version, _COMPARED)])


def _try_hosts(names: list[str]) -> Iterator[Finding]:
    """Ask all hosts at once for their versions, with this interpreter's path, by ssh."""
    if shutil.which("ssh") is None:
        yield Finding("hosts", ", ".join(names), "ssh is not installed here (apt-get install openssh-client)")
        return
    line = shlex.join([sys.executable, "-c", _ASK])
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS:.0f}"]
    asked = [
        subprocess.Popen(
            [*command, name, line], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in names
    ]
    for name, process in zip(names, asked, strict=True):
        try:
            said, complaint = process.communicate(timeout=2 * SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            said, complaint = process.communicate()
        yield _of_host(name, process.returncode, said.strip(), complaint.strip())


def _of_host(name: str, code: int, said: str, complaint: str) -> Finding:
    if code:
        why = complaint.splitlines()[-1] if complaint else f"exit code {code}"
        what = "ssh cannot log into it" if code == 255 else f"{sys.executable} does not work there"
        return Finding(f"host {name}", "not usable", f"{what}: {why}")
    words = f"Python, {', '.join(_COMPARED)}"
    if said != own_versions():
        return Finding(f"host {name}", f"{words}: {said}", f"here they are {own_versions()}: run `make install` there")
    return Finding(f"host {name}", f"reached; {words} as here: {said}")
