from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.load import launcher_config, read
from megatron.config.schema.run import LauncherConfig
from megatron.errors import LaunchError
from megatron.launch import command
from megatron.launch.command import (
    Layout,
    find_layout,
    local_environments,
    runner_command,
    single_layout,
    unsent_secrets,
)
from megatron.launch.hosts import Host
from tests.end_to_end.tiny import settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("n1 slots=2\nn2 slots=2\n")
    return str(path)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "visible_gpus", lambda environ: ["0", "1", "2", "3"])


def launcher(**keys: object) -> LauncherConfig:
    return LauncherConfig.model_validate(keys)


def test_without_a_gpu_there_is_one_process_on_the_cpu() -> None:
    layout = find_layout(launcher(), {"DS_ACCELERATOR": "cpu"})
    assert layout == Layout((Host("localhost", (0,)),))
    [environment] = local_environments(layout, launcher(), {})
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_num_gpus_asks_for_that_many_processes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "usable_cores", lambda: 8)
    keys = launcher(num_gpus=2)
    environments = local_environments(find_layout(keys, {"DS_ACCELERATOR": "cpu"}), keys, {})
    assert [environment["RANK"] for environment in environments] == ["0", "1"]
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1"]
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"4"}
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1


def test_the_users_number_of_threads_stands() -> None:
    layout = single_layout({"DS_ACCELERATOR": "cpu"})
    assert "OMP_NUM_THREADS" not in local_environments(layout, launcher(), {"OMP_NUM_THREADS": "3"})[0]


@pytest.mark.usefixtures("four_gpus")
def test_one_process_per_gpu() -> None:
    layout = find_layout(launcher(), {})
    assert layout.world_size == 4
    assert local_environments(layout, launcher(), {})[3]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert find_layout(launcher(num_gpus=2), {}).gpus == ("0", "1")
    assert find_layout(launcher(include="localhost:1,3"), {}).gpus == ("1", "3")
    assert single_layout({}).gpus == ("0",)


@pytest.mark.usefixtures("four_gpus")
def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"but this machine shows 4 GPUs\. Set num_gpus to 4 or less"):
        find_layout(launcher(num_gpus=8), {})


def test_several_hosts_go_through_the_runner(hostfile: str) -> None:
    layout = find_layout(launcher(hostfile=hostfile), {})
    assert layout.uses_runner
    assert layout.world_size == 4
    assert find_layout(launcher(), {"DLTS_HOSTFILE": hostfile}) == layout


def test_a_hostfile_that_leaves_this_machine_does_not(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text(f"{socket.gethostname()} slots=2\nother slots=2\n")
    keys = launcher(hostfile=str(path), num_nodes=1)
    layout = find_layout(keys, {"DS_ACCELERATOR": "cpu"})
    assert not layout.uses_runner
    assert layout.world_size == 2
    assert find_layout(keys.model_copy(update={"force_multi": True}), {}).uses_runner


def test_a_scheduler_without_a_hostfile_is_told_the_other_way() -> None:
    with pytest.raises(LaunchError, match=r"needs a hostfile.*srun --ntasks-per-node=8 python train\.py"):
        find_layout(launcher(launcher="slurm"), {})


def test_mpi_runners_take_no_filters(hostfile: str) -> None:
    with pytest.raises(LaunchError, match="launcher = openmpi: cannot be combined with include"):
        find_layout(launcher(launcher="openmpi", hostfile=hostfile, include="n1"), {})


def parsed(words: list[str]) -> object:
    """What DeepSpeed's own runner understands of a command."""
    from deepspeed.launcher.runner import parse_args

    return parse_args(words[words.index("deepspeed.launcher.runner") + 1 :])


def test_the_runner_understands_the_command(hostfile: str) -> None:
    keys = launcher(hostfile=hostfile, exclude="n1:0", master_port=1234, no_ssh_check=True)
    words = runner_command(find_layout(keys, {}), keys, "train.py", "PAYLOAD", {"NCCL_DEBUG": "WARN ME"})
    options = parsed(words)
    assert options.hostfile == hostfile  # type: ignore[attr-defined]
    assert options.exclude == "n1:0"  # type: ignore[attr-defined]
    assert options.master_port == 1234  # type: ignore[attr-defined]
    assert options.no_ssh_check  # type: ignore[attr-defined]
    assert options.no_local_rank  # type: ignore[attr-defined]
    assert options.user_script == "train.py"  # type: ignore[attr-defined]
    expected = ["--deepy-payload", "PAYLOAD", "--deepy-env", "NCCL_DEBUG=WARN%20ME"]
    assert options.user_args == expected  # type: ignore[attr-defined]


def test_slurm_gets_account_comment_and_an_address(hostfile: str) -> None:
    keys = launcher(launcher="slurm", hostfile=hostfile, account="physics", comment="a run")
    words = runner_command(find_layout(keys, {}), keys, "train.py", "P", {})
    options = parsed(words)
    assert options.launcher_args == "--comment 'a run' --account physics"  # type: ignore[attr-defined]
    assert options.master_addr == "n1"  # type: ignore[attr-defined]
    assert "MASTER_ADDR=n1" in words
    assert "MASTER_PORT=29500" in words


@pytest.mark.parametrize("kind", ["pdsh", "slurm", "openmpi", "mvapich"])
def test_no_secret_is_on_the_command_line(hostfile: str, kind: str) -> None:
    keys = launcher(launcher=kind, hostfile=hostfile)
    environ = {"WANDB_API_KEY": "tell-nobody", "COMET_API_KEY": "tell-nobody", "HF_TOKEN": "tell-nobody"}
    words = runner_command(find_layout(keys, {}), keys, "train.py", "P", {**environ, "WANDB_MODE": "offline"})
    assert "tell-nobody" not in " ".join(words)
    assert "WANDB_MODE=offline" in words
    expected = sorted(environ) if kind in ("pdsh", "mvapich") else []
    assert unsent_secrets(keys, environ) == expected
    if kind == "openmpi":
        assert parsed(words).launcher_args == "-x COMET_API_KEY -x HF_TOKEN -x WANDB_API_KEY"  # type: ignore[attr-defined]


def test_neox_switches_choose_the_launcher(hostfile: str) -> None:
    keys = launcher_config(read([], None, ["deepspeed_slurm=true", f"hostfile={hostfile}"]))
    assert (keys.launcher, keys.force_multi) == ("slurm", True)


# A scheduler's or ssh's place taken by a script that starts everything on this machine.
SRUN = """#!{python}
import os, subprocess, sys
count, export = int(sys.argv[sys.argv.index("-n") + 1]), next(w for w in sys.argv if w.startswith("--export"))
command = sys.argv[sys.argv.index(export) + 1:]
place = {{"SLURM_NTASKS": str(count), "SLURM_STEP_ID": "0"}}
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
print("WORKER", place.rank, place.world_size, place.master_addr, place.master_port, os.environ["NCCL_NAME"], seed)
"""


@pytest.mark.parametrize("kind", ["slurm", "pdsh"])
def test_workers_of_several_hosts_get_their_place_and_the_config(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's runner is the real one; what it hands the command to is a stand-in on this machine."""
    import yaml

    programs = {"srun": SRUN, "pdsh": PDSH, "sinfo": "#!/bin/sh\n", "ssh": "#!/bin/sh\necho 127.0.0.9\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(settings(tmp_path, hostfile=str(tmp_path / "hosts"))))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_NAME", "a b;c$d")
    command = [sys.executable, "deepy.py", str(tmp_path / "worker.py"), str(tmp_path / "tiny.yml")]
    command += ["--set", f"launcher={kind}", "seed=7", "master_port=1234"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    address = "n1" if kind == "slurm" else "127.0.0.9"
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("WORKER"))
    assert lines == [f"WORKER {rank} 2 {address} 1234 a b;c$d 7" for rank in range(2)], result.stderr
    assert result.returncode == 0
