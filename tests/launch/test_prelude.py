from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.launch import prelude

ROOT = Path(__file__).resolve().parents[2]


def run_with_bare_python(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the launcher with an interpreter that sees no installed packages."""
    for name in ("megatron", "deepy.py"):
        (folder / name).symlink_to(ROOT / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # -S leaves out site-packages; the script's own folder, which holds the link, is put on the path by hand.
    lines = ["import sys", f"sys.path.insert(0, {str(folder)!r})", "from megatron.launch.prelude import prepare"]
    script = folder / "start.py"
    script.write_text("\n".join([*lines, "prepare(sys.argv[0])", "print('started')"]))
    return subprocess.run(
        [sys.executable, "-S", "-B", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=30,
        check=False,
    )


def test_a_python_without_packages_is_told_how_to_install(tmp_path: Path) -> None:
    result = run_with_bare_python(tmp_path)
    assert result.returncode == 2
    assert "lacks yaml, pydantic, numpy, torch, deepspeed." in result.stderr
    assert f"cd {tmp_path} && make install" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_environment_beside_the_script_is_used(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "in the environment: $1"\n')
    python.chmod(0o755)
    result = run_with_bare_python(tmp_path)
    assert result.returncode == 0
    assert result.stdout.strip() == f"in the environment: {tmp_path / 'start.py'}"


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert prelude.missing_packages() == ["Python 3.11"]


def test_variables_sent_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_TEST_NAME", raising=False)
    monkeypatch.setenv("NCCL_TEST_NAME", "mine")
    argv = ["train.py", "--deepy-env", "GLOO_TEST_NAME=a%20b%3D1", "--deepy-env", "NCCL_TEST_NAME=theirs"]
    prelude._apply_sent_environment(argv)
    assert os.environ.pop("GLOO_TEST_NAME") == "a b=1"
    assert os.environ["NCCL_TEST_NAME"] == "mine"
