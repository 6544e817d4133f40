"""The operators, with the device code on CPU tensors in the place of the library's: registration, probes, strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from megatron.ops import choice, logits
from megatron.ops import cross_entropy as plain
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Situation
from megatron.ops.cuda import cross_entropy
from tests.ops.cuda.emulation import SMALL_CLUSTERS, Emulation
from tests.ops.cuda.test_device_code import TOLERANCES, draw, exact

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(emulation: Emulation) -> Iterator[None]:
    """Operators of CPU tensors, computed by the device code."""
    device = emulation.on(SMALL_CLUSTERS)
    library = torch.library.Library("deepy_cuda", "IMPL")
    library.impl("cross_entropy_losses_", device.losses, "CPU")
    library.impl("logits_statistics", device.statistics, "CPU")
    library.impl("logits_gradient_", device.gradient, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["cross_entropy", "share_losses"])
def test_the_probe_accepts_it(name: str, dtype: torch.dtype) -> None:
    operation = CATALOGUE[name]
    (cuda,) = [each for each in operation.candidates if each.name == "cuda"]
    assert choice._disagreement(operation, cuda, Situation(CPU, dtype, 16)) == ""


def test_the_operators_are_registered_well() -> None:
    _, values, labels = draw(torch.float32, 37)
    statistics = torch.ops.deepy_cuda.logits_statistics(values, labels, 3)
    torch.library.opcheck(torch.ops.deepy_cuda.cross_entropy_losses_, (values, labels, 1.0))
    torch.library.opcheck(torch.ops.deepy_cuda.logits_statistics, (values, labels, 3))
    arguments = (values, labels, 3, statistics[0], statistics[1], 1.0)
    torch.library.opcheck(torch.ops.deepy_cuda.logits_gradient_, arguments)


@pytest.mark.parametrize("name", ["cross_entropy", "share_losses"])
def test_torch_compile_keeps_the_kernel_whole(name: str) -> None:
    operation, operators = CATALOGUE[name], []
    (cuda,) = [each for each in operation.candidates if each.name == "cuda"]

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        operators.extend(node for node in graph.graph.nodes if "deepy_cuda" in f"{node.target} {node.args}")
        return graph.forward

    compiled = torch.compile(cuda.load(), backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    found = operation.probe(compiled, CPU, torch.float32, 16)
    expected = operation.probe(cuda.load(), CPU, torch.float32, 16)
    assert operators
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_losses_alone_leave_the_logits() -> None:
    _, values, labels = draw(torch.bfloat16, 333)
    before = values.clone()
    found = cross_entropy.block_losses(values, labels, None)
    torch.testing.assert_close(found.double(), exact(values, labels)[0], rtol=2e-6, atol=2e-6)
    found = cross_entropy.share_losses(values, labels, None, 0, lambda statistics: statistics)
    torch.testing.assert_close(found.double(), exact(values, labels)[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(values, before)


@pytest.mark.parametrize("whole", [True, False])
def test_logits_and_labels_of_any_strides(whole: bool) -> None:
    _, values, labels = draw(torch.float32, 37)
    losses, gradients = exact(values, labels)
    turned, spread = values.t().contiguous().t(), labels.repeat_interleave(2)[::2]
    if whole:
        found = cross_entropy.block_losses(turned, spread, 1.0)
    else:
        found = cross_entropy.share_losses(turned, spread, 1.0, 0, lambda statistics: statistics)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(turned.double(), gradients, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_chunked_loss_takes_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, in chunks of three tokens: the loss and both gradients are those of PyTorch's own losses."""
    monkeypatch.setattr(plain, "_chunk", lambda weight: 3)
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(rows, 9, generator=generator).to(dtype).requires_grad_() for rows in (7, 37)]
    labels, mask = torch.randint(0, 37, (7,), generator=generator), torch.tensor([1.0, 0, 1, 1, 0.5, 0, 1])
    results = []
    for losses in (cross_entropy.block_losses, plain.block_losses):
        total = plain.linear_cross_entropy_sum(*leaves, labels, mask, losses)
        results.append([total.detach(), *torch.autograd.grad(total, leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected.float()).norm() <= 4 * torch.finfo(dtype).eps * expected.float().norm()


def test_ranks_meet_between_the_kernels() -> None:
    """What they agree on is what losses and gradients are made of: here another rank's larger half."""
    _, values, labels = draw(torch.float32, 101)
    other = values + 1.0
    labels += 101
    both = torch.cat((other, values), dim=1)
    losses, gradients = exact(both, labels)
    theirs = logits.logits_statistics(other, labels, 0)

    def meet(own: torch.Tensor) -> torch.Tensor:
        maximum = torch.maximum(own[0], theirs[0])
        total = own[1] * (own[0] - maximum).exp() + theirs[1] * (theirs[0] - maximum).exp()
        return torch.stack((maximum, total, own[2] + theirs[2]))

    found = cross_entropy.share_losses(values, labels, 2.0, 101, meet)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(values.double() / 2, gradients[:, 101:], rtol=2e-6, atol=2e-6)
