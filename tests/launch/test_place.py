from __future__ import annotations

import pytest

from megatron.errors import LaunchError
from megatron.launch.hosts import HOSTS_VARIABLE
from megatron.launch.place import Place, find_place, slot_variables

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "n1"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "MASTER_ADDR": "n1",
}


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, SLURM, OPENMPI])
def test_every_launcher_is_understood(environ: dict[str, str]) -> None:
    place = find_place(environ).listening_at(None, 29500)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert (place.master_addr, place.master_port) == ("n1", 29500)
    assert place.environment()["CROSS_RANK"] == "1"
    assert place.environment()["CROSS_SIZE"] == "2"


def test_nothing_means_one_process() -> None:
    place = find_place({}).listening_at(None, 29500)
    assert (place.rank, place.world_size, place.master_addr) == (0, 1, "127.0.0.1")
    assert place.describe() == ""


def test_a_shell_inside_a_slurm_job_is_one_process() -> None:
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


@pytest.mark.parametrize("step", ["4294967290", "4294967291"])
def test_the_shell_that_salloc_opens_and_a_batch_script_are_one_process(step: str) -> None:
    shell = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_ID": step, "SLURM_STEP_NUM_TASKS": "1"}
    assert find_place(shell).world_size == 1


def test_a_step_that_is_smaller_than_its_job() -> None:
    step = {**SLURM, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1,2"}
    place = find_place({**step, "SLURM_LOCALID": "0", "SLURM_NODEID": "1"})
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (1, 3, 0, 2)


def test_plain_variables_mean_one_machine() -> None:
    place = find_place({"RANK": "1", "WORLD_SIZE": "2"}).listening_at(None, 1234)
    assert place.environment() == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
    }


def test_the_environments_address_wins_over_the_configs() -> None:
    assert find_place(TORCHRUN).listening_at("other", 29500).master_addr == "n1"
    assert find_place({**TORCHRUN, "MASTER_PORT": "7"}).listening_at(None, 29500).master_port == 7


def test_what_a_place_sets_is_read_back() -> None:
    place = Place(5, 8, 1, 4, "n1", 7)
    assert find_place(place.environment()) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2, WORLD_SIZE = 2: a rank counts from 0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "environment: RANK = one: is not a whole number"),
    ],
)
def test_contradictions(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_place(environ)


def test_several_machines_need_an_address() -> None:
    environ = {key: value for key, value in OPENMPI.items() if key != "MASTER_ADDR"}
    with pytest.raises(LaunchError, match=r"MASTER_ADDR is not set: .* Set MASTER_ADDR to the name"):
        find_place(environ).listening_at(None, 29500)
    assert find_place(environ).listening_at("n7", 29500).master_addr == "n7"


MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "n1"}


def test_mpich_is_understood_and_mpi_inside_of_a_slurm_job_is_mpis() -> None:
    assert find_place({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", **MPICH}) == find_place(MPICH)
    assert find_place({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", **OPENMPI}).rank == 5


def test_torchrun_inside_of_a_slurm_step_is_torchruns() -> None:
    assert find_place({**SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", **TORCHRUN}) == find_place(TORCHRUN)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, "RANK = 0, WORLD_SIZE = 1: but SLURM_PROCID = 5, SLURM_NTASKS = 8"),
        ({**OPENMPI, "RANK": "4", "WORLD_SIZE": "8"}, "two launchers, two places"),
        ({"RANK": "1"}, "RANK = 1: but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2: but RANK is not set"),
    ],
)
def test_two_places_or_half_of_one(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_place(environ)


def test_variables_that_agree_are_one_place() -> None:
    assert find_place({**SLURM, "RANK": "5", "WORLD_SIZE": "8"}).rank == 5
    assert find_place({"WORLD_SIZE": "1"}).world_size == 1


def test_pods_with_one_process_each_count_by_their_hosts() -> None:
    pod = find_place({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"})
    assert not pod.is_local_known
    assert (pod.beside(["a", "b", "c"]).local_rank, pod.beside(["a", "b", "c"]).local_world_size) == (0, 1)
    assert (pod.beside(["a", "a", "b"]).local_rank, pod.beside(["a", "a", "b"]).local_world_size) == (1, 2)
    assert find_place({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}).is_local_known


def test_slots_that_a_filter_left_are_what_a_rank_sees() -> None:
    told = {HOSTS_VARIABLE: "n1:0,1;n2:2,3"}
    assert slot_variables(Place(1, 4), told) == {}
    assert slot_variables(Place(2, 4), told) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert slot_variables(Place(0, 4), {**told, "SLURMD_NODENAME": "n2"}) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert slot_variables(Place(2, 4), {**told, "CUDA_VISIBLE_DEVICES": "0"}) == {}
