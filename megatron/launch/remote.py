"""The one command that starts a run on several hosts, for each launcher that can: pdsh, MPI's three, Slurm.

pdsh starts `./deepy.py node` on every host, which starts that host's ranks (`launch/node.py`); the others start every
rank themselves, and a rank reads its place from their variables (`launch/place.py`). Nothing of MPI is used besides:
no mpi4py, no MPI library in the training process. Worker variables travel as arguments, `--deepy-env KEY=VALUE`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from megatron.config.schema.run import LauncherConfig
from megatron.launch.hosts import HOSTS_VARIABLE, Host, describe_hosts, program_of
from megatron.launch.prelude import ENVIRONMENT_FLAG, PAYLOAD_FLAG
from megatron.launch.slurm import is_task

HOME = Path(__file__).resolve().parents[2]
"""Where deepy.py and the scripts lie."""
RUN_VARIABLE = "DEEPY_RUN"
"""A word that no other run has; a host's part of the run is found by it."""
# Variables that change how torch, its collectives or our messages behave, and so must be alike on all machines.
_FORWARDED = re.compile(
    r"(DS_|NCCL_|GLOO_|OMP_|MKL_|TORCH_|PYTORCH_|HF_|WANDB_|COMET_|AWS_|TOKENIZERS_|TRITON_|FI_|UCX_)\w*"
    r"|LOGLEVEL|CUDA_DEVICE_MAX_CONNECTIONS|CUDA_LAUNCH_BLOCKING|DEEPY_LAUNCH_TIME"
)
# What must be set before the interpreter starts.
_PATHS = ("PYTHONPATH", "LD_LIBRARY_PATH")
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|CREDENTIAL")


@dataclass(frozen=True)
class Remote:
    """What runs on several hosts.

    script: as a path from the folder we are in. payload: the config. address, port: where rank 0 listens; "" where the
    launcher's own variables will say it.
    """

    hosts: Sequence[Host]
    script: str
    payload: str
    address: str
    port: int
    variables: Mapping[str, str]

    @property
    def world_size(self) -> int:
        """The number of ranks on all hosts."""
        return sum(len(host.slots) for host in self.hosts)

    def worker_words(self) -> list[str]:
        """Return the command of one rank that reads its place from its launcher's variables."""
        return [sys.executable, "-u", self.script, *self.arguments()]

    def arguments(self) -> list[str]:
        """Return what follows the script: the config, and the variables to set before torch is loaded."""
        words = [PAYLOAD_FLAG, self.payload]
        for key, value in self.variables.items():
            words += [ENVIRONMENT_FLAG, f"{key}={quote(value, safe='/:.,+-_=@;')}"]
        return words


def remote_command(
    hosts: Sequence[Host], launcher: LauncherConfig, script: str, payload: str, environ: Mapping[str, str], run: str
) -> list[str]:
    """Return the argument list that starts `script` with the payload on all hosts.

    run: a word that no other run has. No secret is in it: WANDB_API_KEY and its like stay out, since other users can
    read a command line."""
    remote = Remote(
        hosts, script, payload, _address(hosts, launcher, environ), launcher.master_port,
        _worker_variables(hosts, launcher, environ, run),
    )  # fmt: skip
    return _COMMANDS[launcher.launcher](remote, launcher, environ)


def _address(hosts: Sequence[Host], launcher: LauncherConfig, environ: Mapping[str, str]) -> str:
    """Return where rank 0 listens; Slurm decides which node is the first, and tells the ranks itself."""
    chosen = environ.get("MASTER_ADDR") or launcher.master_addr
    return chosen or ("" if launcher.launcher == "slurm" else hosts[0].name.rpartition("@")[2])


def _worker_variables(
    hosts: Sequence[Host], launcher: LauncherConfig, environ: Mapping[str, str], run: str
) -> dict[str, str]:
    chosen = {k: v for k, v in environ.items() if _FORWARDED.fullmatch(k) and not _SECRET.search(k)}
    chosen |= {HOSTS_VARIABLE: describe_hosts(hosts), RUN_VARIABLE: run}
    address = _address(hosts, launcher, environ)
    if launcher.launcher != "pdsh":
        chosen["MASTER_PORT"] = str(launcher.master_port)
        chosen |= {"MASTER_ADDR": address} if address else {}
    return chosen


def _is_secret(name: str) -> bool:
    return bool(_FORWARDED.fullmatch(name) and _SECRET.search(name))


def unsent_secrets(launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """Return the secrets of this environment that workers on other hosts will not see, because only a command line
    could carry them there. Slurm and MPI's launchers hand the environment over themselves."""
    return [] if launcher.launcher != "pdsh" else sorted(filter(_is_secret, environ))


def _pdsh(remote: Remote, launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """-S: the largest exit code of all hosts; %n: the host's number, which pdsh fills in."""
    node = [sys.executable, "-u", str(HOME / "deepy.py"), "node", "%n", remote.address, str(remote.port)]
    words = shlex.join([*node, remote.script, *remote.arguments()])
    paths = "".join(f"export {name}={shlex.quote(environ[name])}; " for name in _PATHS if environ.get(name))
    return [*_pdsh_words(remote.hosts), f"{paths}cd {shlex.quote(os.getcwd())} && exec {words}"]


def _pdsh_words(hosts: Sequence[Host]) -> list[str]:
    return ["pdsh", "-R", "ssh", "-S", "-f", "1024", "-w", ",".join(host.name for host in hosts)]


def pdsh_signal_command(hosts: Sequence[Host], run: str, name: str) -> list[str]:
    """Return the command that sends a signal ("TERM") to each host's part of a run."""
    path = "${XDG_RUNTIME_DIR:-/tmp}/" + node_pid_file(run, "%n")
    return [*_pdsh_words(hosts), f'test ! -f "{path}" || kill -s {name} "$(cat "{path}")"']


def node_pid_file(run: str, index: object) -> str:
    """Return the name of the file in XDG_RUNTIME_DIR, or else /tmp, in which a host's part of a run notes its process
    id while it runs."""
    return f"deepy-{run}-{index}.pid"


def _openmpi(remote: Remote, launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """Secrets are named only: mpirun takes them from its own environment."""
    words = [program_of("openmpi"), "-n", str(remote.world_size), "--host", _counted(remote.hosts)]
    words += ["--map-by", "slot", "--bind-to", "none", "--wdir", os.getcwd()]
    words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    for key in [*(name for name in _PATHS if environ.get(name)), *sorted(filter(_is_secret, environ))]:
        words += ["-x", key]
    return words + remote.worker_words()


def _hydra(remote: Remote, launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """MPICH's and MVAPICH's launcher are one program, which hands the whole environment over."""
    words = [program_of(launcher.launcher), "-n", str(remote.world_size), "-hosts", _counted(remote.hosts)]
    words += ["-launcher", "ssh"] if "SLURM_JOB_ID" not in environ else []
    return [*words, "-bind-to", "none", "-wdir", os.getcwd(), *remote.worker_words()]


def _counted(hosts: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{len(host.slots)}" for host in hosts)


def _slurm(remote: Remote, launcher: LauncherConfig, environ: Mapping[str, str]) -> list[str]:
    """Where hosts have different numbers of ranks, each host is listed once for each of its ranks."""
    hosts, counts = remote.hosts, {len(host.slots) for host in remote.hosts}
    words = ["srun", f"--nodes={len(hosts)}", f"--ntasks={remote.world_size}"]
    if len(counts) == 1:
        words += [f"--ntasks-per-node={counts.pop()}", f"--nodelist={','.join(host.name for host in hosts)}"]
    else:
        words += ["--distribution=arbitrary", f"--nodelist={','.join(h.name for h in hosts for _ in h.slots)}"]
    words += ["--export=ALL", "--kill-on-bad-exit=0", "--wait=120", f"--chdir={os.getcwd()}"]
    if environ.get("SLURM_CPUS_PER_TASK"):  # of sbatch and salloc; srun takes no notice of it since Slurm 22.05
        words.append(f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}")
    words += ["--overlap"] if is_task(environ) else []  # the step around us holds what the ranks are to use
    words += [f"--comment={launcher.comment}"] if launcher.comment else []
    words += [f"--account={launcher.account}"] if launcher.account else []
    return words + remote.worker_words()


_COMMANDS: dict[str, Callable[[Remote, LauncherConfig, Mapping[str, str]], list[str]]] = {
    "pdsh": _pdsh,
    "openmpi": _openmpi,
    "mpich": _hydra,
    "mvapich": _hydra,
    "slurm": _slurm,
}
