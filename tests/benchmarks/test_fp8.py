"""The fp8 benchmark names what computes a float8 layer here."""

import torch

from benchmarks import fp8
from benchmarks.fp8 import functions
from benchmarks.kernels import Clock
from megatron.ops.choice import Situation


def test_what_is_measured_on_a_cpu():
    found = dict(functions(Situation(torch.device("cpu"), torch.bfloat16, 64)))
    assert {"bf16", "eager"} <= set(found)
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (16, 32))
    exact = inputs.double() @ weight.double().t()
    errors = {name: float((found[name](inputs, weight) - exact).norm() / exact.norm()) for name in ("bf16", "eager")}
    assert errors["bf16"] < 0.01 < errors["eager"] < 0.06


def test_what_does_not_run_costs_its_own_row_only(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no kernel\nimage")

    found = [*functions(Situation(torch.device("cpu"), torch.bfloat16, 64))][:2]
    monkeypatch.setattr(fp8, "functions", lambda situation: iter([found[0], ("broken", broken), found[1]]))
    rows = list(fp8.measure(16, 16, Clock(torch.device("cpu"), 0.0)))
    assert [row.candidate for row in rows] == ["bf16", "eager"] * 2
    assert "broken: no kernel image" in capsys.readouterr().err
