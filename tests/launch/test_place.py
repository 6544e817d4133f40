from __future__ import annotations

import pytest

from megatron.errors import LaunchError
from megatron.launch.place import Place, find_place, first_of_node_list

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


@pytest.mark.parametrize(
    ("text", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[07-09,12],m1", "n07"), ("gpu[3,5]-ib", "gpu3-ib"), ("a-1,b[2-3]", "a-1")],
)
def test_first_of_a_node_list(text: str, first: str) -> None:
    assert first_of_node_list(text) == first
