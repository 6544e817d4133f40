"""The linear map by a lent weight computes what PyTorch's does, bit by bit, and holds no memory of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.ops import linear as module
from megatron.ops.fp8 import float8_linear
from megatron.ops.lent_linear import is_lent, lend, lent_linear
from megatron.ops.linear import linear, linear_reference

INPUTS, OUTPUTS = 48, 80
SHAPES = {"tokens": (37, INPUTS), "batch": (3, 11, INPUTS), "row": (INPUTS,)}
VIEWS = {"aten.t", "aten.view", "aten._unsafe_view", "aten.transpose", "aten.detach", "aten.alias"}

Function = Callable[..., Tensor]


def draw(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> list[Tensor]:
    """Return x, W and, where asked for, b: the same leaves at every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (OUTPUTS, INPUTS), (OUTPUTS,)][: 3 if bias else 2]
    return [nn.Parameter(torch.randn(one, generator=generator).to(dtype)) for one in shapes]


def run(function: Function, leaves: list[Tensor]) -> list[Tensor]:
    """Return y and the gradients of the leaves that have one, of a loss whose gradient is not contiguous."""
    output = function(*leaves)
    (output.pow(2).transpose(0, -1).sum() + output.select(-1, 0).sum()).backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bit_by_bit_pytorchs(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    found, right = run(lent_linear, draw(shape, dtype, bias)), run(linear_reference, draw(shape, dtype, bias))
    assert len(found) == 3 + bias
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_has_no_gradient(frozen: int) -> None:
    leaves, others = draw((7, INPUTS), torch.float32, True), draw((7, INPUTS), torch.float32, True)
    leaves[frozen].requires_grad_(False)
    others[frozen].requires_grad_(False)
    for one, other in zip(run(lent_linear, leaves), run(linear_reference, others), strict=True):
        assert torch.equal(one, other)
    assert leaves[frozen].grad is None


class _Computed(TorchDispatchMode):
    """Counts the operations that compute: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket)
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_as_many_operations_as_pytorch_needs(bias: bool) -> None:
    counted = []
    for function in (lent_linear, linear_reference):
        leaves = draw((3, 11, INPUTS), torch.float32, bias)
        upstream = torch.ones(3, 11, OUTPUTS)
        with _Computed() as computed:
            torch.autograd.grad(function(*leaves), leaves, upstream)
        counted.append(sorted(computed.names))
    assert counted[0] == counted[1]
    assert counted[0].count("aten.mm") + counted[0].count("aten.addmm") == 3


@pytest.mark.parametrize(("function", "times"), [(lent_linear, 2), (linear_reference, 1)], ids=["lent", "PyTorch's"])
def test_the_backward_pass_reads_the_memory_that_the_weight_has_then(function: Function, times: int) -> None:
    """As under ZeRO 3: empty memory behind the forward pass, other before the backward. PyTorch's keeps the old."""
    inputs, weight = draw((3, 11, INPUTS), torch.float32, bias=False)
    first, whole = StorageWeakRef(weight.untyped_storage()), weight.detach().clone()
    output = function(inputs, weight)
    weight.data = torch.empty(0)
    assert first.expired() is (times == 2)
    weight.data = 2 * whole  # so that it is seen which of the two was read
    to_inputs, to_weight = torch.autograd.grad(output, (inputs, weight), torch.ones_like(output))
    torch.testing.assert_close(to_inputs, times * torch.ones_like(output) @ whole)
    torch.testing.assert_close(to_weight, torch.ones(OUTPUTS, 33) @ inputs.detach().reshape(33, INPUTS))


def test_float8_holds_no_memory_of_the_weight_either() -> None:
    inputs, weight = draw((3, 11, INPUTS), torch.bfloat16, bias=False)
    whole, expected = weight.detach().clone(), run(float8_linear, draw((3, 11, INPUTS), torch.bfloat16, bias=False))
    first = StorageWeakRef(weight.untyped_storage())
    output = float8_linear(inputs, weight)
    weight.data = torch.empty(0, dtype=weight.dtype)
    assert first.expired()
    weight.data = whole
    for one, other in zip(run(lambda *_: output, [inputs, weight]), expected, strict=True):
        assert torch.equal(one, other)


def test_a_weight_changed_in_place_in_between_is_an_error() -> None:
    leaves = draw((7, INPUTS), torch.float32, True)
    output = lent_linear(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def kept_by(function: Function, leaves: list[Tensor]) -> str:
    return type(function(*leaves).grad_fn).__name__


@pytest.mark.parametrize("function", [linear, float8_linear], ids=["linear", "float8, of odd features"])
def test_linear_keeps_no_view_of_what_is_lent(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 12), (9, 12)))
    assert not is_lent(weight)
    assert "Lent" not in kept_by(function, [inputs, weight])
    lend(weight)
    assert is_lent(weight)
    assert kept_by(function, [inputs, weight]) == "_LentLinearBackward"
    with monkeypatch.context() as patch:
        patch.setattr(module, "SMALLEST", 0)
        patch.setattr(module, "onednn_wins", lambda: True)
        patch.setattr(module, "_is_faster_by_onednn", lambda *_: False)
        assert kept_by(linear, [inputs, weight]) == "_LinearBackward"  # which keeps the parameter, too


def test_compiled_code_traces_pytorchs_own() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    leaves = draw((5, INPUTS), torch.float32, True)
    lend(leaves[1])
    output = torch.compile(linear, backend=keep, fullgraph=True)(*leaves)
    assert torch.equal(output, linear_reference(*leaves))
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [torch._C._nn.linear]
