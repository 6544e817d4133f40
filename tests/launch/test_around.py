from __future__ import annotations

from pathlib import Path

import pytest

from megatron.launch import around
from megatron.launch.around import other_hosts, own_versions

SSH = """#!/bin/sh
case "$*" in
  *" n1 "*) echo "{versions}" ;;
  *" n2 "*) echo "3.11.0 1.0 0.1" ;;
  *" n3 "*) echo "no such file" >&2; exit 127 ;;
  *) echo "Permission denied" >&2; exit 255 ;;
esac
"""


def test_every_host_of_the_hostfile_is_asked_for_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(SSH.format(versions=own_versions()))
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"n{number} slots=1\n" for number in range(1, 5)))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = {finding.name: finding for finding in other_hosts({"DLTS_HOSTFILE": str(tmp_path / "hosts")})}
    assert found["host n1"].problem == ""
    assert "reached" in found["host n1"].value
    assert found["host n2"].problem == f"here they are {own_versions()}: run `make install` there"
    assert found["host n3"].problem.endswith("does not work there: no such file")
    assert found["host n4"].problem == "ssh cannot log into it: Permission denied"
    assert "lo 127.0.0.1" in found["interfaces"].value


def test_without_a_hostfile_it_is_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(around, "own_name_is_loopback", lambda: True)
    found = {finding.name: finding for finding in other_hosts({"SLURM_JOB_NODELIST": "n[1-2]"})}
    assert found["hostfile"].value.startswith("none (set DLTS_HOSTFILE")
    assert found["Slurm job"].value == "n1, n2"
    assert "gloo is given the interface" in found["own name"].value
    wrong = [finding for finding in other_hosts({"DLTS_HOSTFILE": "/no/such/file"}) if finding.name == "hostfile"]
    assert "cannot be read" in wrong[0].problem
