"""The kernels' own source, run on a CPU, equals the formula; and what would be undefined on a GPU is seen here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from torch import Tensor

from megatron.ops import logits as plain
from megatron.ops.cuda.build import SOURCES
from tests.ops.cuda.emulation import (
    A100,
    GEFORCE,
    H100,
    SMALL,
    SMALL_CLUSTERS,
    Emulation,
    EmulationError,
    Situation,
    compiled,
)

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SITUATIONS = {"roomy": H100, "held in part": SMALL, "shared by clusters": SMALL_CLUSTERS}
ROWS = 5


def draw(dtype: torch.dtype, columns: int, offset: int = 3, padding: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return a buffer that is NaN around the logits [r, v], the logits, and labels with the first and last column."""
    generator = torch.Generator().manual_seed(columns)
    buffer = torch.full((ROWS + 2, offset + columns + padding), float("nan"), dtype=dtype)
    logits = buffer[1:-1, offset : offset + columns]
    logits.copy_(6 * torch.randn(ROWS, columns, generator=generator))
    labels = torch.randint(0, columns, (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, columns - 1])
    return buffer, logits, labels


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [r] and their gradients [r, v] in fp64."""
    leaf = logits.detach().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    losses.sum().backward()
    return losses.detach(), leaf.grad


def require_only(buffer: Tensor, logits: Tensor) -> None:
    """Fail where something beside the logits was written."""
    before = logits.clone()
    logits.fill_(float("nan"))
    assert buffer.isnan().all(), "something beside the logits was written"
    logits.copy_(before)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("columns", [1, 7, 37, 4099, 9001])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_losses_and_gradients_in_place(emulation: Emulation, dtype: torch.dtype, columns: int, situation: str) -> None:
    buffer, logits, labels = draw(dtype, columns)
    losses, gradients = exact(logits, labels)
    found = emulation.on(SITUATIONS[situation]).losses(logits, labels, 4.0)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits.double() / 4, gradients, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    require_only(buffer, logits)


@pytest.mark.parametrize("offset", range(8))
def test_rows_at_every_distance_from_16_bytes(emulation: Emulation, offset: int) -> None:
    """Each row begins 2 bytes later than the one before, so that heads and tails of all lengths occur."""
    _, logits, labels = draw(torch.bfloat16, 129, offset=offset, padding=9 - offset)
    losses, gradients = exact(logits, labels)
    torch.testing.assert_close(emulation.losses(logits, labels, 1.0).double(), losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), gradients, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("situation", [H100, A100], ids=["two blocks", "one block"])
def test_the_vocabulary_of_gpt_neox(emulation: Emulation, situation: Situation) -> None:
    _, logits, labels = draw(torch.bfloat16, 50304, offset=0, padding=0)
    losses, gradients = exact(logits, labels)
    found = emulation.on(situation).losses(logits, labels, 1.0)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), gradients, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_logits_so_large_that_their_exponentials_overflow(emulation: Emulation, situation: str) -> None:
    """The maximum grows from thread to thread, and the label's own probability is 0 in fp32."""
    logits = torch.linspace(-1000, 1000, 6000).repeat(2, 1)
    labels = torch.tensor([0, 5999])
    losses, gradients = exact(logits, labels)
    found = emulation.on(SITUATIONS[situation]).losses(logits, labels, 1.0)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_columns_of_minus_infinity_and_rows_that_are_no_numbers(emulation: Emulation, situation: str) -> None:
    """A whole thread's, a whole block's columns may be -inf, as those that only pad a vocabulary may be."""
    _, logits, labels = draw(torch.float32, 4099)
    labels[:] = 4000
    logits[:, :3900] = float("-inf")
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    losses, gradients = exact(logits, labels)
    found = emulation.on(SITUATIONS[situation]).losses(logits, labels, 1.0)
    assert losses.isnan().tolist() == [False, True, True, False, False]
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6, equal_nan=True)
    finite = ~losses.isnan()
    torch.testing.assert_close(logits[finite].double(), gradients[finite], rtol=2e-6, atol=2e-6)


def test_a_label_that_is_ignored_has_no_logit(emulation: Emulation) -> None:
    """Its loss is finite, so that a weight of 0 is the end of it, and its gradient that of the other columns."""
    buffer, logits, labels = draw(torch.float32, 1001)
    labels[:3] = torch.tensor([-100, -1, 1001])
    expected = logits.double()
    found = emulation.losses(logits, labels, 1.0)
    torch.testing.assert_close(found[:3].double(), expected[:3].logsumexp(dim=1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits[:3].double(), expected[:3].softmax(dim=1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found[3:].double(), exact(expected[3:], labels[3:])[0], rtol=2e-6, atol=2e-6)
    require_only(buffer, logits)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_shares_of_the_vocabulary(emulation: Emulation, dtype: torch.dtype, situation: str) -> None:
    """Two ranks' statistics are the formula's, leave the logits, and give each rank its own columns' gradient."""
    device, columns, middle = emulation.on(SITUATIONS[situation]), 5001, 2003
    buffer, logits, labels = draw(dtype, columns)
    shares, firsts = [logits[:, :middle], logits[:, middle:]], [0, middle]
    gradients = exact(logits, labels)[1]
    before = logits.clone()
    parts = [device.statistics(share, labels, first) for share, first in zip(shares, firsts, strict=True)]
    assert torch.equal(logits, before)
    for share, first, part in zip(shares, firsts, parts, strict=True):
        expected = plain.logits_statistics(share.double(), labels, first)
        torch.testing.assert_close(part.double(), expected, rtol=2e-6, atol=2e-6)
    maximum = torch.maximum(parts[0][0], parts[1][0])
    total = sum(part[1] * (part[0] - maximum).exp() for part in parts)
    for share, first in zip(shares, firsts, strict=True):
        device.gradient(share, labels, first, maximum, total, 4.0)
    torch.testing.assert_close(logits.double() / 4, gradients, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    require_only(buffer, logits)


@pytest.mark.parametrize("clusters", [1, 3, 8])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_neither_the_order_of_threads_nor_the_number_of_blocks_changes_a_bit(
    emulation: Emulation, order: int, clusters: int
) -> None:
    _, logits, labels = draw(torch.bfloat16, 2999)
    twin = draw(torch.bfloat16, 2999)[1]
    found = emulation.on(replace(SMALL_CLUSTERS, clusters=clusters, order=order)).losses(logits, labels, 1.0)
    assert torch.equal(found, emulation.on(SMALL_CLUSTERS).losses(twin, labels, 1.0))
    assert torch.equal(logits, twin)


def test_how_rows_are_spread_over_a_gpu(emulation: Emulation) -> None:
    """Threads, blocks that share a row, columns of each, vectors held, bytes of shared memory."""
    assert emulation.plan(50304, 2) == [512, 1, 50304, 6288, 101136]  # two blocks on a multiprocessor
    assert emulation.plan(50304, 4) == [512, 2, 25152, 6288, 101136]
    assert emulation.plan(128256, 2) == [512, 4, 32064, 4008, 64656]
    assert emulation.plan(256000, 2) == [512, 8, 32000, 4000, 64528]
    assert emulation.on(A100).plan(50304, 2) == [1024, 1, 50304, 6288, 101136]
    assert emulation.on(A100).plan(128256, 2) == [1024, 1, 128256, 10399, 166912]  # 65 % of the row
    assert emulation.on(GEFORCE).plan(50304, 2) == [1024, 1, 50304, 6288, 101136]


DEFECTS = {
    "nothing waits for the copies": ("wait_copies(RELEASE ? row.stages - 1 : row.stages - 1 - stage);", ""),
    "a place is given away before it is read": (
        "const int count = read_group<true>(group, row.held, stage, 0, min(row.slice.body, row.resident));\n    write",
        "request(row.next, row.held, row.resident, stage);\n    const int count = "
        "read_group<true>(group, row.held, stage, 0, min(row.slice.body, row.resident));\n    write",
    ),
    "two rows share the place of their sums": ("scratch, parity);", "scratch, 0);"),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.usefixtures("emulation")  # for its reasons to skip
def test_what_a_gpu_would_get_wrong_by_chance_is_wrong_here(tmp_path: Path, defect: str) -> None:
    right, wrong = DEFECTS[defect]
    sources, changed = tmp_path / "sources", 0
    copytree(SOURCES, sources)
    for path in sources.glob("*.cuh"):
        text = path.read_text()
        changed += text.count(right)
        path.write_text(text.replace(right, wrong))
    assert changed == 1
    broken = Emulation(compiled(tmp_path, sources, "-O0", "-DONLY_FP32_LOSSES=true"), SMALL)
    assert not all(agrees(broken.on(replace(SMALL, order=order, clusters=1))) for order in range(3))


def agrees(device: Emulation) -> bool:
    """Return whether losses and gradients of a few rows are right."""
    _, logits, labels = draw(torch.float32, 3001)
    losses, gradients = exact(logits, labels)
    try:
        found = device.losses(logits, labels, 1.0)
    except EmulationError:
        return False
    return torch.allclose(found.double(), losses, atol=1e-5) and torch.allclose(logits.double(), gradients, atol=1e-5)
