"""benchmarks/gpu.sh runs every step whatever happens to one of them, and says in the end what did."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *train.py*) echo boom >&2; exit 3 ;;
  *"-m pytest"*) exec kill -9 $$ ;;
  *) echo "ran: $*" ;;
esac
"""


def test_a_failed_step_costs_only_itself(tmp_path: Path) -> None:
    python, wheels, out = tmp_path / "python", tmp_path / "some wheels", tmp_path / "the results"
    python.write_text(PYTHON)
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "a.whl").touch()
    environment = {**os.environ, "PYTHON": str(python), "WHEELS": str(wheels), "DEEPY_TEST_DEVICE": "cpu", "WRITE": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1, ran.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["device"] == "no GPU: DEEPY_TEST_DEVICE=cpu"
    assert {step["step"]: step["result"] for step in summary["steps"]} == {
        "install": "passed",
        "kernels": "passed",
        "fp8": "passed",
        "attention": "passed",
        "train": "FAILED: exit code 3",
        "startup": "passed",
        "data": "passed",
        "tests": "FAILED: killed",
    }
    assert "train        0 s  FAILED: exit code 3" in ran.stdout
    assert (out / "train.log").read_text() == "boom\n"
    assert (out / "kernels.log").read_text() == (
        f"ran: benchmarks/kernels.py --limit 110 --json {out}/kernels.json --quick --write\n"
    )
    attention = f"ran: benchmarks/attention.py --json {out}/attention.json --quick --write\n"
    assert (out / "attention.log").read_text() == attention
    assert f"{wheels}/a.whl" in (out / "install.log").read_text()
