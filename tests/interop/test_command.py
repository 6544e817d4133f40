"""tools/ckpts/convert.py as a person runs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.interop.models import save_model

_SPEC = importlib.util.spec_from_file_location("convert_tool", Path(__file__).parents[2] / "tools/ckpts/convert.py")
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


def test_export_then_import(tmp_path, capsys):
    save_model(tmp_path / "run")
    assert tool.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert "is ready; its README.md has the comparison" in capsys.readouterr().out
    assert tool.main(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    assert "./deepy.py generate.py" in capsys.readouterr().out


def test_problems_go_to_stderr_with_exit_code_2(tmp_path, capsys):
    assert tool.main(["export", str(tmp_path / "none"), str(tmp_path / "hf")]) == 2
    assert "There is no such folder" in capsys.readouterr().err


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "checkpoint -> Hugging Face folder, loaded and compared" in capsys.readouterr().out
