"""tools/ckpts/inspect_checkpoints.py as a person runs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.save import save_checkpoint
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import make_state, small_config, whole

TOOL = Path(__file__).parents[2] / "tools" / "ckpts" / "inspect_checkpoints.py"


_SPEC = importlib.util.spec_from_file_location("inspect_checkpoints", TOOL)
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


@pytest.fixture
def root(tmp_path):
    for iteration, layers in ((4, 2), (8, 2), (9, 3)):
        progress = {"consumed_tokens": 1000 * iteration}
        config = small_config(num_layers=layers)
        save_checkpoint(tmp_path, iteration, whole(make_state(iteration // 9)), progress, config, {}, Mesh.single())
    return tmp_path


def test_list_show_and_verify(root, capsys):
    assert tool.main(["list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["global_step4", "global_step8", "global_step9"]
    assert lines[-1].endswith("9,000 tokens  <- latest")
    assert tool.main(["show", str(root), "--tensors"]) == 0
    assert "head [1, 5, 3] BF16" in capsys.readouterr().out
    assert tool.main(["verify", str(root), "--iteration", "4"]) == 0
    assert "global_step4 is whole" in capsys.readouterr().out


def test_damage_is_shown(root, capsys):
    path = root / "global_step8" / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert tool.main(["list", str(root)]) == 0
    assert "damaged: The file is truncated" in capsys.readouterr().out
    assert tool.main(["verify", str(root), "--iteration", "8"]) == 2
    assert "truncated" in capsys.readouterr().err


def test_diff(root, capsys):
    first, second, third = (str(root / f"global_step{step}") for step in (4, 8, 9))
    assert tool.main(["diff", first, second]) == 0
    assert capsys.readouterr().out == ""
    assert tool.main(["diff", first, third]) == 1
    out = capsys.readouterr().out
    assert "num_layers: 2 | 3" in out
    assert "master scale: largest difference" in out


def test_it_runs_as_a_script(root):
    done = subprocess.run([sys.executable, TOOL, "list", root], capture_output=True, text=True, check=True)
    assert "global_step9" in done.stdout
