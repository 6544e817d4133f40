from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import LaunchError
from megatron.launch.hosts import Host, hostfile_path, read_hostfile, select

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
