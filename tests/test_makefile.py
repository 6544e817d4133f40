"""What `make` says before it installs anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("version", ["(3, 10, 9)", "(3, 14, 0)"])
def test_another_python_is_refused(tmp_path: Path, version: str) -> None:
    python = tmp_path / "python"
    program = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$@\"\n")
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "install"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"deepy needs Python 3.11 to 3.13, and {python} is another." in result.stdout
    assert not (tmp_path / "venv").exists()


def test_what_is_installed_with_the_lock_is_in_it() -> None:
    locked = {line.partition("==")[0] for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines()}
    named = re.findall(r"install --quiet \$\(LOCK\) ([a-z ]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named == ["torch setuptools"]
    assert set(named[0].split()) <= locked
