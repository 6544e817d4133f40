from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import LaunchError
from megatron.launch import cli
from megatron.launch.hosts import Host, hostfile_path, read_hostfile, require_reachable, select

HOSTS = [Host("n1", (0, 1, 2, 3)), Host("n2", (0, 1, 2, 3))]


def write(folder: Path, text: str) -> str:
    path = folder / "hostfile"
    path.write_text(text)
    return str(path)


def test_hostfile_with_comments(tmp_path: Path) -> None:
    path = write(tmp_path, "# the cluster\nn1 slots=4\n\nn2   slots = 4  # the second\n")
    assert read_hostfile(path) == HOSTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 4\n", r"hostfile:1: n1 4: is not a host with its number of devices\. Write `name slots=8`"),
        ("n1 slots=0\n", "is not a host with its number of devices"),
        ("n1 slots=1\nn1 slots=2\n", "hostfile:2: n1 slots=2: names the host a second time"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        read_hostfile(write(tmp_path, text))


def test_a_missing_hostfile_is_named() -> None:
    with pytest.raises(LaunchError, match=r"hostfile = /nowhere: cannot be read \(No such file or directory\)"):
        read_hostfile("/nowhere")


def test_hostfile_comes_from_the_config_first() -> None:
    assert hostfile_path("mine", {"DLTS_HOSTFILE": "theirs"}) == "mine"
    assert hostfile_path(None, {"DLTS_HOSTFILE": "theirs"}) == "theirs"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, HOSTS),
        ({"include": "n2"}, [HOSTS[1]]),
        ({"include": "n2:1@n1:0,3"}, [Host("n1", (0, 3)), Host("n2", (1,))]),
        ({"exclude": "n1"}, [HOSTS[1]]),
        ({"exclude": "n2:0,2"}, [HOSTS[0], Host("n2", (1, 3))]),
        ({"num_nodes": 1}, [HOSTS[0]]),
        ({"num_gpus": 2}, [Host("n1", (0, 1)), Host("n2", (0, 1))]),
    ],
)
def test_filters(keys: dict[str, str | int], expected: list[Host]) -> None:
    assert select(HOSTS, **{"include": None, "exclude": None, **keys}) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"include": "n1", "exclude": "n2"}, "are two ways to choose devices"),
        ({"include": "n1", "num_nodes": 1}, "are two ways to choose devices"),
        ({"include": "n3"}, r"n3: is not a host of the hostfile \(n1, n2\)"),
        ({"include": "n1:x"}, "with slots. Write `host@host:0,2`"),
        ({"include": "n1:7"}, r"n1 has the slots \(0, 1, 2, 3\), not \[7\]"),
        ({"exclude": "n1@n2"}, "leaves 0 of the 2 hosts"),
        ({"num_nodes": 3}, "leaves 2 of the 2 hosts"),
        ({"num_gpus": 8}, "num_gpus = 8: is more than the 4 slots of n1"),
    ],
)
def test_filters_that_cannot_be_met(keys: dict[str, str | int], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        select(HOSTS, **{"include": None, "exclude": None, **keys})  # type: ignore[arg-type]


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Let PATH hold nothing but some shell scripts."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_programs_that_a_launcher_lacks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch)
    with pytest.raises(LaunchError) as caught:
        require_reachable(HOSTS, "pdsh")
    assert [str(problem).split(" on this")[0] for problem in caught.value.problems] == [
        "launcher = pdsh: the program pdsh is not installed",
        "launcher = pdsh: the program ssh is not installed",
    ]
    with pytest.raises(LaunchError, match=r"launcher = slurm: the program srun is not installed"):
        require_reachable(HOSTS, "slurm")


def test_every_host_that_ssh_cannot_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'case "$*" in *n2*) echo "ssh: Could not resolve hostname n2" >&2; exit 255;; esac'
    programs(tmp_path, monkeypatch, ssh=body, pdsh="exit 0")
    require_reachable(HOSTS[:1], "pdsh")
    require_reachable(HOSTS, "pdsh", checks_ssh=False)
    with pytest.raises(LaunchError) as caught:
        require_reachable(HOSTS, "pdsh")
    assert str(caught.value) == (
        "host n2: ssh cannot log into it (ssh: Could not resolve hostname n2). Make `ssh n2 true` work without a "
        "password, correct the hostfile, or set exclude: n2"
    )


def test_nothing_is_started_where_a_host_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(tmp_path, monkeypatch, ssh='echo "Permission denied" >&2; exit 255', pdsh="exit 0")
    model = Path(__file__).parents[2] / "configs" / "125M.yml"
    words = ["train.py", str(model), "-H", write(tmp_path, "n1 slots=1\nn2 slots=1\n")]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said.count("ssh cannot log into it (Permission denied).") == 2
    assert "Traceback" not in said
    assert cli.main([*words, "--print"]) == 0


def test_the_launcher_of_another_mpi_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, mpirun='echo "mpirun (Open MPI) 4.1.4"')
    require_reachable(HOSTS, "openmpi")
    with pytest.raises(
        LaunchError, match=r"launcher = mvapich: but .*mpirun is another MPI's .* Set launcher to openmpi"
    ):
        require_reachable(HOSTS, "mvapich")
    programs(tmp_path, monkeypatch, mpirun='echo "HYDRA build details:"')
    require_reachable(HOSTS, "mvapich")
