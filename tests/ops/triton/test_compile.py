"""Every kernel compiles for sm_80 and sm_90, where it can run, without a GPU, spills nothing, and is in the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from megatron.ops.triton.launch import operator, recording, start
from megatron.ops.triton.samples import SAMPLES

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "kernels.md"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, object]], str]:
    """What the command reports of all samples, and its table."""
    report = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megatron.ops.triton.compile", "--json", str(report)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return json.loads(report.read_text()), ran.stdout


def test_every_sample_compiles_for_both_and_nothing_spills(compiled: tuple[list[dict[str, object]], str]) -> None:
    rows, _ = compiled
    found = {(row["sample"], row["arch"]) for row in rows}
    assert found == {(sample.name, arch) for sample in SAMPLES for arch in (80, 90) if arch >= sample.least}
    assert {sample.name.partition(" ")[0] for sample in SAMPLES if sample.least} == {"float8_linear"}
    assert [row for row in rows if row["spilled"]] == []
    assert all(0 < int(row["registers"]) <= 255 for row in rows)


def test_what_only_moves_memory_moves_it_in_wide_words(compiled: tuple[list[dict[str, object]], str]) -> None:
    files = {"norms", "rotary", "activations", "dropout_add", "fp8"}
    moving = [row for row in compiled[0] if str(row["kernel"]).partition(".")[0] in files]
    assert {str(row["kernel"]).partition(".")[0] for row in moving} == files
    assert [row for row in moving if row["narrow"]] == []


def test_the_recorded_table_is_current(compiled: tuple[list[dict[str, object]], str]) -> None:
    text = PAGE.read_text()
    table = compiled[1]
    if f"with Triton {triton.__version__}," not in text:  # whose registers are others; kernels and samples are the same
        text, table = names(text), names(table)
    assert text.endswith(table), "run python -m megatron.ops.triton.compile --page docs/kernels.md"


def names(text: str) -> str:
    """Return the lines of a table without what the compiler decides."""
    return "\n".join("|".join(line.split("|")[:4]) for line in text.splitlines() if line.startswith("|"))


def test_recording_starts_nothing_and_tells_everything() -> None:
    with recording() as launches:
        start("kernel", (2,), torch.empty(3, device="meta"), 5, BLOCK=16)
    assert [(each.kernel, each.grid, each.arguments[1:], each.constants) for each in launches] == [
        ("kernel", (2,), (5,), {"BLOCK": 16})
    ]


def test_an_operator_has_the_schema_of_its_annotations() -> None:
    def only_for_this_test(inputs: torch.Tensor, other: torch.Tensor | None, factor: float) -> torch.Tensor:
        return inputs.new_empty(3)

    overload = operator(mutates=("other",))(only_for_this_test)
    arguments = "Tensor inputs, Tensor(a1!)? other, float factor"
    assert str(overload._schema) == f"deepy::only_for_this_test({arguments}) -> Tensor"
