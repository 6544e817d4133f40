"""What is asked for settles what is tried; only what runs and agrees with the formula is taken, and a table says so."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.ops import norms
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Asked, Candidate, Operation, Situation, choose
from megatron.ops.measured import Fastest, among, read_rows, write
from megatron.ops.probes import rms_norm

CPU = Situation(torch.device("cpu"), torch.bfloat16, 32)
GPU = Situation(torch.device("cuda"), torch.bfloat16, 32)


def exact(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norms.rms_norm(inputs, weight, eps)


def wrong(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norms.rms_norm(inputs, weight, eps) * 1.2


def wrong_gradient(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norms.rms_norm(inputs, weight.detach() + 0 * weight, eps)


def broken(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def not_a_number(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norms.rms_norm(inputs, weight, eps) * float("nan")


def operation(*fused: str) -> Operation:
    here = [Candidate(name, f"{__name__}:{name}", "torch") for name in fused]
    candidates = (Candidate("eager", "megatron.ops.norms:rms_norm"), *here)
    return Operation("rms_norm", "megatron.ops.norms:rms_norm_reference", candidates, rms_norm)


@pytest.fixture(autouse=True)
def probed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's situation, with the probe run here."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[exact.__module__])
    monkeypatch.setattr("megatron.ops.choice.probe_device", lambda situation: torch.device("cpu"))


def chosen(asked: Asked, *fused: str, situation: Situation = GPU, fastest: str | None = None) -> tuple[str, str]:
    choices = choose({"rms_norm": asked}, situation, {"rms_norm": operation(*fused)}, lambda *_: fastest)
    return choices.choices[0].candidate, choices.table()


def test_what_is_to_be_tried_where_nothing_was_measured() -> None:
    known = replace(operation("exact", "wrong"), unmeasured="exact")
    for fastest, candidate in ((None, "exact"), ("eager", "eager")):
        (found,) = choose({"rms_norm": "auto"}, GPU, {"rms_norm": known}, lambda *_, name=fastest: name).choices
        assert found.candidate == candidate
    assert choose({"rms_norm": "auto"}, CPU, {"rms_norm": known}).choices[0].candidate == "eager"
    assert CATALOGUE["float8_linear"].unmeasured == "triton"


@pytest.mark.parametrize(
    ("asked", "fastest", "candidate", "why"),
    [
        ("auto", None, "eager", "nothing was measured on this device"),
        ("auto", "eager", "eager", "the fastest measured on this device"),
        ("auto", "exact", "exact", "the fastest measured on this device"),
        (True, "eager", "exact", "true was asked for"),
        ("exact", None, "exact", "exact was asked for"),
        (False, None, "eager", "false was asked for"),
        ("apex", None, "eager", "there is no apex for it"),
    ],
)
def test_what_is_asked_for(asked: Asked, fastest: str | None, candidate: str, why: str) -> None:
    found, table = chosen(asked, "exact", fastest=fastest)
    assert found == candidate
    assert why in table


def test_a_cpu_takes_what_was_written_for_it() -> None:
    """And tries the next, where the first cannot be had; a GPU takes none of it."""
    known = operation("exact", "missing", "exact", "wrong")
    eager, on_gpu, *others = known.candidates
    mine = tuple(replace(each, device="cpu", package="") for each in others)
    entry = replace(known, candidates=(eager, on_gpu, *mine))
    (found,) = choose({"rms_norm": "auto"}, CPU, {"rms_norm": entry}).choices
    assert (found.candidate, found.why) == ("exact", "auto on cpu")
    assert [name for name, _ in found.refused] == ["missing"]
    (found,) = choose({"rms_norm": True}, GPU, {"rms_norm": replace(entry, candidates=(eager, *mine))}).choices
    assert found.refused[0] == ("missing", "needs a CPU device, and this is cuda")


def test_a_cpu_keeps_to_eager_where_nothing_was_and_says_why_where_more_was_asked_for() -> None:
    assert chosen("auto", "exact", situation=CPU)[0] == "eager"
    found, table = chosen(True, "exact", situation=CPU)
    assert found == "eager"
    assert "needs a CUDA device, and this is cpu" in table


@pytest.mark.parametrize(
    ("fused", "reason"),
    [
        ("wrong", "differs from the formula by"),
        ("wrong_gradient", "in value 2 of the probe"),
        ("not_a_number", "differs from the formula by nan"),
        ("broken", "RuntimeError: no kernel image is available for execution on the device"),
        ("missing", "AttributeError: module"),
    ],
)
def test_what_fails_is_passed_over_in_its_own_words(fused: str, reason: str) -> None:
    found, table = chosen(True, fused, "exact")
    assert found == "exact"
    assert f"not {fused}" in table
    assert reason in table
    assert chosen(fused, fused)[0] == "eager"


def test_what_is_not_installed() -> None:
    nowhere = Candidate("nowhere", "nowhere.at.all:function", "no_such_package")
    assert nowhere.obstacle(GPU) == "the package no_such_package is not installed"


def test_every_candidate_of_the_catalogue_that_is_installed_is_there() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert entry.candidates[0].name == ("sdpa" if name.startswith("attention") else "eager")
        assert entry.unmeasured in {candidate.name for candidate in entry.candidates} | {"eager"}
        assert callable(entry.candidates[0].load())
        assert callable(entry.formula())


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_passes_its_own_probe(name: str, dtype: torch.dtype) -> None:
    """So that a probe refuses what is wrong, and not what is eager."""
    entry = CATALOGUE[name]
    situation = Situation(GPU.device, dtype, 24)
    itself = Operation(name, entry.twin, (entry.candidates[0], Candidate("itself", entry.candidates[0].place, "torch")),
                       entry.probe)  # fmt: skip
    choices = choose({name: "itself"}, situation, {name: itself})
    assert choices.choices[0].candidate == "itself", choices.table()


def test_measurements_hold_from_their_hidden_size_on() -> None:
    rows = (
        Fastest("NVIDIA H200", "rms_norm", 768, "eager"),
        Fastest("NVIDIA H200", "rms_norm", 2048, "triton"),
        Fastest("NVIDIA A100", "rms_norm", 512, "liger"),
    )
    assert [among(rows, "NVIDIA H200 NVL", "rms_norm", width) for width in (512, 1024, 2048, 8192)] == [
        None, "eager", "triton", "triton",
    ]  # fmt: skip
    assert among(rows, "NVIDIA H200", "layer_norm", 4096) is None


def test_on_a_cpu_nothing_of_triton_is_imported() -> None:
    code = (
        "import sys, torch\n"
        "from megatron.config.resolve import resolve\n"
        "from megatron.model.build import build_model\n"
        "from megatron.parallel.mesh import Mesh\n"
        "keys = dict(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8, max_position_embeddings=8,\n"
        "            pos_emb='rotary', hidden_dropout=0.1, train_micro_batch_size_per_gpu=1, train_iters=1)\n"
        "build_model(resolve(keys), 32, Mesh.single())\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('triton', 'liger_kernel', 'apex')]\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert 'megatron.ops.triton' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_was_measured_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text("[]\n")
    first = [Fastest("NVIDIA H200", "rms_norm", 768, "eager"), Fastest("NVIDIA A100", "rms_norm", 768, "liger")]
    write(first, path)
    assert set(read_rows(path)) == set(first)
    again = [Fastest("NVIDIA H200", "rms_norm", 1024, "triton"), Fastest("NVIDIA H200", "bias_gelu", 768, "compile")]
    assert write(again, path) == path
    assert set(read_rows(path)) == {*again, first[1]}
    write([], path)
    assert len(read_rows(path)) == 3


def test_the_file_that_comes_with_the_library_names_what_there_is() -> None:
    for row in read_rows():
        assert row.candidate in [candidate.name for candidate in CATALOGUE[row.operation].candidates]
