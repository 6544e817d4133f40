"""tools/ckpts/inspect.py as a person runs it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.save import save_checkpoint
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import make_state, small_config, whole

TOOL = Path(__file__).parents[2] / "tools" / "ckpts" / "inspect.py"


_SPEC = importlib.util.spec_from_file_location("inspect_tool", TOOL)
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


@pytest.fixture
def root(tmp_path):
    for iteration, layers in ((4, 2), (8, 2), (9, 3)):
        progress = {"consumed_tokens": 1000 * iteration}
        config = small_config(num_layers=layers)
        save_checkpoint(tmp_path, iteration, whole(make_state(iteration // 9)), progress, config, {}, Mesh.single())
    return tmp_path


def test_what_a_checkpoint_holds(root, capsys):
    assert tool.main([str(root), "--tensors", "--norms", "--config", "--verify"]) == 0
    out = capsys.readouterr().out
    for line in (
        "iteration   9",
        "progress    consumed_tokens 9,000",
        "topology    tp1 pp1 dp1 zero0",
        f"parameters  {sum(t.numel() for (_, kind), t in make_state().items() if kind == 'weight')}",
        "num_layers ",
    ):
        assert line.rstrip() in out
    norm = torch.linalg.vector_norm(make_state(1)["head", "weight"].double()).item()
    assert re.search(rf"weight +head +1 x 5 x 3 +BF16 +{norm:.6g}", out)
    assert "agree with their hashes" in out


def test_it_speaks_json(root, capsys):
    assert tool.main([str(root), "--iteration", "4", "--json", "--norms"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"] == 4
    assert found["kinds"]["weight"] == {"tensors": 4, "dtypes": ["BF16"]}
    assert found["topology"]["zero"] == 0
    assert found["config"]["model"]["num_layers"] == 2
    assert len(found["tensors"]) == 12
    assert tool.main(["list", str(root), "--json"]) == 0
    assert [row["latest"] for row in json.loads(capsys.readouterr().out)] == [False, False, True]


def test_list_and_damage(root, capsys):
    assert tool.main(["list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["global_step4", "global_step8", "global_step9"]
    assert re.search(r"9,000 +tp1 pp1 dp1 zero0 +latest$", lines[-1])
    path = root / "global_step8" / "rank_00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert tool.main(["list", str(root)]) == 0
    assert re.search(r"global_step8 +DAMAGED +The file is truncated", capsys.readouterr().out)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert tool.main([str(root), "--iteration", "8"]) == 0
    assert tool.main([str(root), "--iteration", "8", "--verify"]) == 2
    assert "do not match their hash" in capsys.readouterr().err


def test_two_are_compared(root, capsys):
    first, second, third = (str(root / f"global_step{step}") for step in (4, 8, 9))
    assert tool.main(["compare", first, first]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "THE SAME: 12 tensors, config and progress"
    assert tool.main(["compare", first, second]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "DIFFERENT: 1 counts of progress; all 12 tensors are the same"
    assert re.search(r"consumed_tokens +4000 +8000", out)
    assert tool.main(["compare", first, third, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"model.num_layers": [2, 3]}
    one, other = make_state(0)["head", "master"], make_state(1)["head", "master"]
    (head,) = (entry for entry in found["tensors"] if (entry["name"], entry["kind"]) == ("head", "master"))
    assert head["largest"] == pytest.approx((one - other).abs().max().item(), rel=1e-6)
    assert head["relative"] == pytest.approx(head["largest"] / one.abs().max().item(), rel=1e-6)


def test_tensors_of_one_only_and_of_other_shapes(tmp_path, capsys):
    left, right = make_state(0), make_state(0)
    del left["scale", "weight"]
    right["head", "exp_avg"] = right["head", "exp_avg"].reshape(5, 3)
    right["head", "weight"] = right["head", "weight"].float()
    for name, state in (("left", left), ("right", right)):
        save_checkpoint(tmp_path / name, 1, whole(state), {}, small_config(), {}, Mesh.single())
    assert tool.main(["compare", str(tmp_path / "left"), str(tmp_path / "right")]) == 1
    out = capsys.readouterr().out
    assert re.search(r"weight +scale +only in the second", out)
    assert re.search(r"exp_avg +head +shape \[1, 5, 3\] and \[5, 3\]", out)
    assert re.search(r"weight +head +dtype bfloat16 and float32 +0\.000e\+00", out)
    assert out.splitlines()[-1] == "DIFFERENT: 3 tensors"


def test_it_runs_as_a_script_beside_a_module_of_its_name(root):
    done = subprocess.run([sys.executable, TOOL, "list", root], capture_output=True, text=True, check=True)
    assert "global_step9" in done.stdout
    for script in TOOL.parent.glob("*.py"):  # every script there would import this one instead of Python's inspect
        text = script.read_text()
        assert text.index("sys.path[0] = ") < text.index("import argparse"), script
