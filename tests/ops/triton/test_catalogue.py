"""The probes accept the kernels, in every dtype, and refuse a function that leaves out one argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from megatron.ops import adamw, choice, cross_entropy, fp8, grouped_gemm, logits, scan, softmax
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Candidate, Situation
from megatron.ops.triton import scan as scan_kernels

WRONG: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda x, labels, scale: cross_entropy.block_losses(x, labels.roll(1), scale),
    "share_losses": lambda x, labels, scale, first, meet: logits.share_losses(x, labels, scale, first + 1, meet),
    "masked_softmax": lambda x, scale, causal, window, mask=None: softmax.masked_softmax(x, scale, causal, None, mask),
    "grouped_matmul": lambda x, weights, offsets: grouped_gemm.grouped_matmul(x, weights.flip(0), offsets),
    "selective_scan": lambda *arguments: scan.selective_scan(*arguments[:7], 0 * arguments[7]),
    "float8_linear": lambda x, weight, bias=None: fp8.float8_linear(x, weight.flip(0), bias),
    "sum_of_squares": lambda tensors: adamw.sum_of_squares(tensors[:1]),
    "adamw_update_": lambda *arguments: adamw.adamw_update_reference_(*arguments[:-1], 0.0),
}
ACCEPTED = [
    (name, dtype)
    for name in WRONG
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if name != "selective_scan" or dtype == torch.bfloat16  # the interpreter needs 5 s for it
]


@pytest.mark.parametrize(("name", "dtype"), ACCEPTED)
def test_a_probe_accepts_the_kernel(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(scan_kernels, "CHANNELS", 8)  # what is only padding takes time in the interpreter
    operation = CATALOGUE[name]
    (kernel,) = [each for each in operation.candidates if each.name == "triton"]
    assert choice._disagreement(operation, kernel, Situation(device, dtype, 16)) == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_probe_refuses_another_function(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, load = CATALOGUE[name], Candidate.load
    monkeypatch.setattr(Candidate, "load", lambda self: WRONG[name] if self.name == "wrong" else load(self))
    found = choice._disagreement(operation, Candidate("wrong", ""), Situation(device, torch.bfloat16, 16))
    assert found.startswith("differs from the formula by ")


@pytest.mark.parametrize("name", ["masked_softmax", "grouped_matmul", "share_losses", "adamw_update_", "float8_linear"])
def test_torch_compile_keeps_the_kernel_whole(name: str, device: torch.device) -> None:
    """Traced in one graph, with the operator in it, the kernel gives what it gives eagerly."""
    operation, operators = CATALOGUE[name], []
    (kernel,) = [each for each in operation.candidates if each.name == "triton"]

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        # What writes in place is an argument of a node that makes a function of it.
        operators.extend(node for node in graph.graph.nodes if "deepy" in f"{node.target} {node.args}")
        return graph.forward

    compiled = torch.compile(kernel.load(), backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    found = operation.probe(compiled, device, torch.float32, 16)
    expected = operation.probe(kernel.load(), device, torch.float32, 16)
    assert operators
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
