from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron.config.load import launcher_config, read
from megatron.config.schema.run import LauncherConfig
from megatron.errors import LaunchError
from megatron.launch import command
from megatron.launch.command import Layout, find_layout, local_environments, single_layout
from megatron.launch.hosts import Host


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


def test_several_hosts_are_started_by_another_launcher(hostfile: str) -> None:
    layout = find_layout(launcher(hostfile=hostfile), {})
    assert layout.is_remote
    assert layout.world_size == 4
    assert find_layout(launcher(), {"DLTS_HOSTFILE": hostfile}) == layout


def test_a_hostfile_that_leaves_this_machine_does_not(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text(f"{socket.gethostname()} slots=2\nother slots=2\n")
    keys = launcher(hostfile=str(path), num_nodes=1)
    layout = find_layout(keys, {"DS_ACCELERATOR": "cpu"})
    assert not layout.is_remote
    assert layout.world_size == 2
    assert find_layout(keys.model_copy(update={"force_multi": True}), {}).is_remote


def test_slurm_gives_the_nodes_of_its_job() -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    layout = find_layout(launcher(launcher="slurm"), job)
    assert layout.hosts == (Host("n1", (0, 1, 2, 3)), Host("n2", (0, 1, 2, 3)))
    assert find_layout(launcher(launcher="slurm", exclude="n1"), job).hosts == layout.hosts[1:]
    assert not find_layout(launcher(), {**job, "DS_ACCELERATOR": "cpu"}).is_remote


def test_a_scheduler_without_a_hostfile_is_told_the_other_way() -> None:
    with pytest.raises(LaunchError, match=r"needs a hostfile.*srun --ntasks-per-node=8 python train\.py"):
        find_layout(launcher(launcher="slurm"), {})


def test_neox_switches_choose_the_launcher(hostfile: str) -> None:
    keys = launcher_config(read([], None, ["deepspeed_slurm=true", f"hostfile={hostfile}"]))
    assert (keys.launcher, keys.force_multi) == ("slurm", True)
