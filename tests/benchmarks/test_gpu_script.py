"""benchmarks/gpu.sh runs every step whatever happens to one of them, and says in the end what did."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *find_spec*) exit 0 ;;
  *train.py*) echo boom >&2; exit 3 ;;
  *"-m pytest"*) exec kill -9 $$ ;;
  *) echo "ran: $*" ;;
esac
"""


def run_script(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script without a GPU."""
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    settings = {**os.environ, "DEEPY_TEST_DEVICE": "cpu", **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=False)


def test_a_failed_step_costs_only_itself(tmp_path: Path) -> None:
    python, wheels, out = tmp_path / "python", tmp_path / "some wheels", tmp_path / "the results"
    python.write_text(PYTHON)
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "a.whl").touch()
    environment = {"PYTHON": str(python), "WHEELS": str(wheels), "WRITE": "1", "PACK": str(tmp_path / "all.tar.gz")}
    ran = run_script(environment, str(out))
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
        "alone": "FAILED: killed",
    }
    assert "train        0 s  FAILED: exit code 3" in ran.stdout
    assert (out / "train.log").read_text() == "boom\n"
    assert (out / "kernels.log").read_text() == (
        f"ran: benchmarks/kernels.py --limit 95 --json {out}/kernels.json --quick --write\n"
    )
    attention = f"ran: benchmarks/attention.py --json {out}/attention.json --quick --write\n"
    assert (out / "attention.log").read_text() == attention
    assert f"{wheels}/a.whl" in (out / "install.log").read_text()
    with tarfile.open(tmp_path / "all.tar.gz") as pack:
        names = set(pack.getnames())
    assert {"summary.json", "measured.json", "device.txt", "tests.log", "train.log", "data.log"} <= names


def test_what_is_done_is_written_after_each_step(tmp_path: Path) -> None:
    """A run that is killed keeps what it has: here the second step ends the script itself."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f"""#!/usr/bin/env bash
case "$*" in
  *attention.py*) cp {out}/summary.json {tmp_path}/before.json; read -r _ _ _ script _ < /proc/$PPID/stat
    kill -9 "$script" ;;
  *find_spec*) exit 1 ;;
esac
""")
    python.chmod(0o755)
    pack = tmp_path / "pack.tar.gz"
    ran = run_script({"PYTHON": str(python), "PACK": str(pack)}, str(out), "kernels", "attention", "train")
    assert ran.returncode == -9
    assert [step["step"] for step in json.loads((tmp_path / "before.json").read_text())["steps"]] == ["kernels"]
    with tarfile.open(pack) as kept:
        assert "kernels.log" in kept.getnames()


def test_only_some_steps_with_more_time_and_only_modules_with_gpu_tests(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\ncase "$*" in *find_spec*) exit 1 ;; esac\necho "ran: $*"\n')
    python.chmod(0o755)
    ran = run_script({"PYTHON": str(python), "BUDGET": "300"}, str(tmp_path / "out"), "tests", "fp8")
    assert ran.returncode == 0
    assert "== tests (at most 300 s)" in ran.stdout
    assert "== fp8 (at most 120 s)" in ran.stdout
    assert "== kernels" not in ran.stdout
    words = (tmp_path / "out" / "tests.log").read_text().split()
    given = {word for word in words if word.startswith("tests/")}
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()}
    kernels = set((ROOT / "tests" / "ops" / "triton").glob("test_*.py"))
    assert {ROOT / name for name in given} == marked | kernels
