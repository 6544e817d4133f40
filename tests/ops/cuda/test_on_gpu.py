"""The library on a GPU: built there by nvcc, against the formula. Nothing here has run yet."""

from __future__ import annotations

import pytest
import torch

from megatron.ops import choice, logits
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Situation
from megatron.ops.cuda import build, cross_entropy
from tests.ops.cuda.test_device_code import TOLERANCES, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(build.compiler() is None, reason="no nvcc"),
]
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def ready() -> None:
    reason = build.make_ready(DEVICE)
    assert reason == ""


def draw(dtype: torch.dtype, rows: int, columns: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [r, v], whose rows are `padding` values apart, and labels with the first and last column."""
    torch.manual_seed(columns)
    values = (6 * torch.randn(rows, columns + padding, device=DEVICE)).to(dtype)[:, :columns]
    labels = torch.randint(0, columns, (rows,), device=DEVICE)
    labels[:2] = torch.tensor([0, columns - 1], device=DEVICE)
    return values, labels


@pytest.mark.parametrize("columns", [1, 37, 4099, 50304, 50257, 128256, 256000])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_losses_and_gradients_in_place(dtype: torch.dtype, columns: int) -> None:
    """More rows than run side by side; held by one block, by a cluster of them, or in part."""
    values, labels = draw(dtype, 601, columns, padding=3)
    losses, gradients = exact(values, labels)
    found = cross_entropy.block_losses(values, labels, 4.0)
    torch.testing.assert_close(found.double(), losses, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(values.double() / 4, gradients, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_shares_of_the_vocabulary(dtype: torch.dtype) -> None:
    values, labels = draw(dtype, 601, 25153)
    labels += torch.arange(601, device=DEVICE) % 2 * 25153
    twin = values.double()
    for scale in (None, 4.0):
        found = cross_entropy.share_losses(values, labels, scale, 25153, lambda statistics: statistics)
    statistics = logits.logits_statistics(twin, labels, 25153)
    logits.logits_gradient_(twin, labels, 25153, statistics[0], statistics[1], 4.0)
    expected = statistics[1].log() + statistics[0] - statistics[2]
    torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(values.double(), twin, rtol=4 * TOLERANCES[dtype], atol=4 * TOLERANCES[dtype])


def test_logits_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("less than 8 GiB are free")
    values = torch.zeros(43000, 50304, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.full((43000,), 50303, device=DEVICE)
    values[-1, 50303] = 12.0
    expected = exact(values[-1:], labels[-1:])
    found = cross_entropy.block_losses(values, labels, 1.0)
    torch.testing.assert_close(found[-1:].double(), expected[0], rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(values[-1:].double(), expected[1], rtol=8e-3, atol=8e-3)


def test_it_waits_for_the_stream_that_it_is_called_in() -> None:
    values, labels = draw(torch.bfloat16, 512, 50304)
    expected = exact(values, labels)[0]
    source, values = values, torch.zeros_like(values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        values.copy_(source)
        found = cross_entropy.block_losses(values, labels, 1.0)
    stream.synchronize()
    torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=4e-6)


def test_a_cuda_graph_can_hold_it() -> None:
    values, labels = draw(torch.bfloat16, 64, 50304)
    source, expected = values.clone(), exact(values, labels)[0]
    cross_entropy.block_losses(values, labels, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values.copy_(source)
        found = cross_entropy.block_losses(values, labels, 1.0)
    graph.replay()
    torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["cross_entropy", "share_losses"])
def test_the_probe_accepts_it(name: str, dtype: torch.dtype) -> None:
    operation = CATALOGUE[name]
    (cuda,) = [each for each in operation.candidates if each.name == "cuda"]
    assert choice._disagreement(operation, cuda, Situation(DEVICE, dtype, 768)) == ""


def test_the_operators_are_registered_well() -> None:
    values, labels = draw(torch.float32, 5, 37)
    statistics = torch.ops.deepy_cuda.logits_statistics(values, labels, 3)
    torch.library.opcheck(torch.ops.deepy_cuda.cross_entropy_losses_, (values, labels, 1.0))
    torch.library.opcheck(torch.ops.deepy_cuda.logits_statistics, (values, labels, 3))
    arguments = (values, labels, 3, statistics[0], statistics[1], 1.0)
    torch.library.opcheck(torch.ops.deepy_cuda.logits_gradient_, arguments)
