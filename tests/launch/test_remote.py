from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.config.schema.run import LauncherConfig
from megatron.launch import hosts
from megatron.launch.hosts import HOSTS_VARIABLE, Host
from megatron.launch.remote import pdsh_signal_command, remote_command, unsent_secrets
from tests.end_to_end.tiny import settings

ROOT = Path(__file__).resolve().parents[2]
TWO = (Host("n1", (0, 1)), Host("n2", (0, 1)))
KINDS = ("pdsh", "openmpi", "mpich", "mvapich", "slurm")


def launcher(**keys: object) -> LauncherConfig:
    return LauncherConfig.model_validate(keys)


def command(kind: str, environ: dict[str, str] | None = None, on: tuple[Host, ...] = TWO, **keys: object) -> list[str]:
    return remote_command(on, launcher(launcher=kind, **keys), "train.py", "PAYLOAD", environ or {}, "run")


def test_pdsh_starts_a_part_of_the_run_on_every_host() -> None:
    words = command("pdsh", {"NCCL_DEBUG": "WARN ME"}, master_port=1234)
    assert words[:-1] == ["pdsh", "-R", "ssh", "-S", "-f", "1024", "-w", "n1,n2"]
    there, _, line = words[-1].partition(" && exec ")
    assert shlex.split(there) == ["cd", os.getcwd()]
    expected = [sys.executable, "-u", str(ROOT / "deepy.py"), "node", "%n", "n1", "1234", "train.py"]
    expected += ["--deepy-payload", "PAYLOAD", "--deepy-env", "NCCL_DEBUG=WARN%20ME"]
    expected += ["--deepy-env", f"{HOSTS_VARIABLE}=n1:0,1;n2:0,1", "--deepy-env", "DEEPY_RUN=run"]
    assert shlex.split(line) == expected


def test_a_stop_reaches_each_host_by_the_id_of_its_process() -> None:
    path = '"${XDG_RUNTIME_DIR:-/tmp}/deepy-run-%n.pid"'
    assert pdsh_signal_command(TWO, "run", "TERM")[-1] == f'test ! -f {path} || kill -s TERM "$(cat {path})"'


def test_the_address_is_the_first_hosts_the_configs_or_the_environments() -> None:
    def address(kind: str, environ: dict[str, str], **keys: object) -> set[str]:
        return {word for word in command(kind, environ, **keys) if word.startswith("MASTER_ADDR=")}

    assert address("openmpi", {}) == {"MASTER_ADDR=n1"}
    assert address("openmpi", {}, master_addr="m") == {"MASTER_ADDR=m"}
    assert address("mpich", {"MASTER_ADDR": "e"}, master_addr="m") == {"MASTER_ADDR=e"}
    assert address("slurm", {}) == set()  # which node is the first, Slurm tells the ranks
    assert command("pdsh", on=(Host("me@n1", (0,)), Host("me@n2", (0,))))[-1].count(" n1 29500 ") == 1


def test_open_mpi_and_mpich_are_told_hosts_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    unequal = (Host("n1", (0, 1, 2)), Host("n2", (1,)))
    words = command("openmpi", on=unequal)
    assert words[:5] == ["mpirun.openmpi", "-n", "4", "--host", "n1:3,n2:1"]
    assert "--allow-run-as-root" not in words
    assert command("mpich", on=unequal)[:7] == ["mpiexec.hydra", "-n", "4", "-hosts", "n1:3,n2:1", "-launcher", "ssh"]
    assert "-launcher" not in command("mvapich", {"SLURM_JOB_ID": "1"})  # it is Slurm's to start processes there
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in command("openmpi")


def test_slurm_is_told_nodes_tasks_account_and_comment() -> None:
    words = command("slurm", account="physics", comment="a run")
    for word in ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=n1,n2"):
        assert word in words
    assert {"--comment=a run", "--account=physics", "MASTER_PORT=29500"} <= set(words)
    assert not {word for word in words if word.startswith(("--overlap", "--cpus-per-task"))}
    inside = command("slurm", {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "12"})
    assert {"--overlap", "--cpus-per-task=12"} <= set(inside)
    words = command("slurm", on=(Host("n1", (0, 1)), Host("n2", (0,))))
    assert {"--ntasks=3", "--distribution=arbitrary", "--nodelist=n1,n1,n2"} <= set(words)


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_on_the_command_line(kind: str) -> None:
    environ = {"WANDB_API_KEY": "tell-nobody", "AWS_SECRET_ACCESS_KEY": "tell-nobody", "HF_TOKEN": "tell-nobody"}
    words = command(kind, {**environ, "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"})
    assert "tell-nobody" not in " ".join(words)
    assert "WANDB_MODE=offline" in " ".join(words)
    assert unsent_secrets(launcher(launcher=kind), environ) == (sorted(environ) if kind == "pdsh" else [])
    named = [word for flag, word in itertools.pairwise(words) if flag == "-x"]
    assert named == (sorted(environ) if kind == "openmpi" else [])


# A scheduler's or ssh's place taken by a script that starts everything on this machine.
SRUN = """#!{python}
import os, subprocess, sys
options = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
count, command = int(options["--ntasks"]), sys.argv[sys.argv.index({python!r}):]
place = {{"SLURM_NTASKS": str(count), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": options["--nodelist"]}}
ranks = [subprocess.Popen(command, env={{**os.environ, **place, "SLURM_PROCID": str(r), "SLURM_LOCALID": "0"}})
         for r in range(count)]
sys.exit(max(rank.wait() for rank in ranks))
"""
PDSH = """#!{python}
import os, subprocess, sys
where = sys.argv.index("-w") + 1
command, bare = " ".join(sys.argv[where + 1:]), {{"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}}
nodes = [subprocess.Popen(["sh", "-c", command.replace("%n", str(n))], env=bare) for n in range(2)]
sys.exit(max(node.wait() for node in nodes))
"""
WORKER = """
import os, sys
from megatron.launch.prelude import _apply_sent_environment
from megatron.launch.place import find_place
from megatron.config.transport import unpack
_apply_sent_environment(sys.argv)
place = find_place(os.environ).listening_at(None, 1)
seed = unpack(sys.argv[sys.argv.index("--deepy-payload") + 1]).numerics.seed
words = "WORKER", place.rank, place.world_size, place.master_addr, place.master_port, os.environ["NCCL_NAME"], seed
sys.stdout.write(" ".join(map(str, words)) + "\\n")
"""


@pytest.mark.parametrize("kind", ["slurm", "pdsh"])
def test_workers_of_several_hosts_get_their_place_and_the_config(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What starts processes on hosts is a stand-in on this machine; all else is real."""
    programs = {"srun": SRUN, "pdsh": PDSH, "ssh": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(settings(tmp_path, hostfile=str(tmp_path / "hosts"))))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NCCL_NAME", "a b;c$d")
    command = [sys.executable, "deepy.py", str(tmp_path / "worker.py"), str(tmp_path / "tiny.yml")]
    command += ["--set", f"launcher={kind}", "seed=7", "master_port=1234"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("WORKER"))
    assert lines == [f"WORKER {rank} 2 n1 1234 a b;c$d 7" for rank in range(2)], result.stderr
    assert result.returncode == 0
