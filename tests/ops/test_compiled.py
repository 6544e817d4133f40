"""The `compile` candidates: what is traced is whole and right, and what cannot be compiled says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from megatron.ops import choice
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Situation, choose
from megatron.ops.compiled import COMPILE, Compiled, mend_cpp_reductions, own_copy

CPU = Situation(torch.device("cpu"), torch.float32, 24)
COMPILED = [name for name, operation in CATALOGUE.items() if operation.candidates[-1].name == COMPILE]


def test_element_wise_operations_can_be_compiled() -> None:
    assert set(COMPILED) == {
        "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "rotate_packed", "bias_gelu", "bias_gelu_tanh",
        "bias_swiglu", "bias_geglu", "add_dropped",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_each_is_one_graph_that_agrees_with_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, with its backward pass, but run by PyTorch: C++ compilers are slow."""
    compile_, calls = torch.compile, []

    def traced(function: Any) -> Any:
        calls.append(function)
        return compile_(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    assert choice._disagreement(CATALOGUE[name], CATALOGUE[name].candidates[-1], CPU) == ""
    assert calls


def test_what_is_compiled_on_a_cpu_is_compiled_by_its_compiler() -> None:
    """In C++, forward and backward; that there is one is a condition of PyTorch's own tests as well as of this one."""
    (chosen,) = choose({"bias_swiglu": COMPILE}, CPU, CATALOGUE).choices
    assert chosen.candidate == COMPILE, chosen.refused
    inputs = torch.randn(5, 48, requires_grad=True)
    expected = torch.nn.functional.silu(inputs[:, 24:]) * inputs[:, :24]
    found = chosen.function(inputs, None)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each.square().sum(), inputs)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_biases_with_one_gradient_can_be_compiled_in_bf16() -> None:
    """PyTorch's own code generator declares their sum twice; without scopes around each it is no C++."""
    mend_cpp_reductions()
    mend_cpp_reductions()
    inputs = torch.randn(64, 32, dtype=torch.bfloat16)
    biases = [torch.randn(32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]

    def loss(inputs: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (inputs + first + second).square().sum()

    outcomes = [
        torch.autograd.grad(function(inputs, *biases), biases)
        for function in (loss, torch.compile(loss, dynamic=False))
    ]
    torch.testing.assert_close(*outcomes, rtol=2e-2, atol=1.0)


def test_without_a_compiler_eager_is_taken_and_the_table_says_why() -> None:
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        choices = choose({"bias_swiglu": COMPILE}, CPU, CATALOGUE)
    assert choices.choices[0].candidate == "eager"
    assert "needs a C++ compiler such as g++ (InvalidCxxCompiler: No working C++ compiler found" in choices.table()


def test_other_devices_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Compiled(COMPILE, "megatron.ops.norms:rms_norm")
    assert "needs a CPU or a CUDA device, and this is meta" in candidate.obstacle(
        Situation(torch.device("meta"), torch.float32, 8)
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        candidate.obstacle(Situation(torch.device("cuda"), torch.float32, 8)) == "the package triton is not installed"
    )


def test_a_probes_shapes_are_not_those_of_the_run() -> None:
    def double(value: int, by: int = 2) -> int:
        return value * by

    one, other = own_copy(double), own_copy(double)
    assert one(3) == other(3) == double(3) == 6
    assert len({one.__code__.co_name, other.__code__.co_name, "double"}) == 3
