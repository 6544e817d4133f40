from __future__ import annotations

import pytest

from megatron.launch.hosts import Host
from megatron.launch.slurm import allocated_hosts, counts, node_names, ranks_to_hosts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[07-09,12],m1", ["n07", "n08", "n09", "n12", "m1"]),
        ("gpu[3,5]-ib", ["gpu3-ib", "gpu5-ib"]),
        ("a-1,b[2-3]", ["a-1", "b2", "b3"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert node_names(text) == names


def test_counts() -> None:
    assert counts("2(x3),1") == [2, 2, 2, 1]
    assert counts("8") == [8]


def test_the_nodes_of_a_job_have_its_tasks_or_its_gpus_as_slots() -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-2]"}
    assert allocated_hosts({}) == []
    assert allocated_hosts(job) == [Host("n1", (0,)), Host("n2", (0,))]
    assert allocated_hosts({**job, "SLURM_GPUS_ON_NODE": "2"})[1] == Host("n2", (0, 1))
    tasks = {**job, "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_GPUS_ON_NODE": "8"}
    assert allocated_hosts(tasks) == [Host("n1", (0, 1)), Host("n2", (0,))]


def test_the_node_of_every_rank_of_a_step() -> None:
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert ranks_to_hosts(step) == ["n1", "n1", "n2"]
    assert ranks_to_hosts({**step, "SLURM_DISTRIBUTION": "cyclic"}) == []
    assert ranks_to_hosts({}) == []
