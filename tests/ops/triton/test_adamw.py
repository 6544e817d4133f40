"""The AdamW kernels equal torch.optim.AdamW over several steps, write nothing else, and skip what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.engine import graphs
from megatron.ops import adamw as plain
from megatron.ops.triton import adamw
from tests.engine.tape import TapeRecorder
from tests.ops.triton.poison import poisoned

SHAPES = [(3, 5), (1,), (64,), (7, 11), (2, 40)]
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor takes several programs, and a program several blocks."""
    monkeypatch.setattr(adamw, "SPAN", 32)
    monkeypatch.setattr(adamw, "BLOCK", 16)


class Guarded:
    """A list of tensors of SHAPES in one buffer of NaN, at odd places."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        gap = 3
        sizes = [torch.Size(shape).numel() for shape in SHAPES]
        self.buffer = torch.full((sum(sizes) + gap * (len(sizes) + 1),), float("nan"), dtype=dtype, device=device)
        self.tensors, place = [], gap
        for shape, size in zip(SHAPES, sizes, strict=True):
            self.tensors.append(self.buffer[place : place + size].view(shape))
            place += size + gap
        self.num_guards = gap * (len(sizes) + 1)

    def fill(self, generator: torch.Generator) -> list[Tensor]:
        for tensor in self.tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        return self.tensors

    def check(self) -> None:
        assert int(self.buffer.isnan().sum()) == self.num_guards


@pytest.mark.parametrize("weight_type", [None, torch.bfloat16, torch.float16])
def test_several_steps(weight_type: torch.dtype | None, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    lists = [Guarded(device) for _ in range(4)]
    gradients, masters, averages, squares = (each.tensors for each in lists)
    lists[1].fill(generator)
    for tensor in averages + squares:
        tensor.zero_()
    weights = Guarded(device, weight_type) if weight_type else None
    twins = [master.detach().double().clone().requires_grad_() for master in masters]
    optimizer = torch.optim.AdamW(twins, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    step = torch.zeros((), device=device)
    for number in range(3):
        rate = 1e-2 / (number + 1)
        optimizer.param_groups[0]["lr"] = rate
        lists[0].fill(generator)
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.double()
        norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
        optimizer.step()
        with poisoned():
            total = adamw.sum_of_squares(gradients)
        torch.testing.assert_close(total.sqrt(), norm, rtol=1e-6, atol=0)
        step += 1
        coefficient = plain.coefficient_of(total.sqrt(), 1.0, 1.0)
        copies = weights.tensors if weights else []
        adamw.adamw_update_(gradients, masters, averages, squares, copies, coefficient, step, rate, **SETTINGS)
        for each in [*lists, *([weights] if weights else [])]:
            each.check()
    for index, twin in enumerate(twins):
        state = optimizer.state[twin]
        for ours, theirs in (
            (masters[index], twin.detach()),
            (averages[index], state["exp_avg"]),
            (squares[index], state["exp_avg_sq"]),
        ):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-7)
        if weights:
            # The interpreter cuts bf16 off where hardware rounds: one unit of the last place.
            unit = torch.finfo(weights.buffer.dtype).eps
            torch.testing.assert_close(weights.tensors[index].float(), masters[index], rtol=unit, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_plain_update_is_the_same(scale: float, device: torch.device) -> None:
    """Kernel and formula on the same numbers, with clipping and a loss scale."""
    generator = torch.Generator().manual_seed(1)
    lists = [[torch.rand(shape, generator=generator).to(device) for shape in SHAPES] for _ in range(4)]
    twins = [[tensor.clone() for tensor in each] for each in lists]
    weights, twin_weights = ([torch.zeros(shape, device=device) for shape in SHAPES] for _ in range(2))
    step = torch.tensor(4.0, device=device)
    for operations, update, state, copies in (
        (adamw, adamw.adamw_update_, lists, weights),
        (plain, plain.adamw_update_reference_, twins, twin_weights),
    ):
        coefficient = plain.coefficient_of(operations.sum_of_squares(state[0]).sqrt() / scale, scale, 0.1)
        update(*state, copies, coefficient, step, 1e-2, **SETTINGS)
    for ours, theirs in zip([*lists, weights], [*twins, twin_weights], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def twins_of(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in each] for each in lists]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_converted_exactly_as_they_are_read(
    dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(6)
    lists = [Guarded(device).fill(generator) for _ in range(4)]
    lists[3] = [tensor.abs_() for tensor in lists[3]]
    gradients = Guarded(device, dtype).fill(generator)
    copies, twins = [tensor.float() for tensor in gradients], twins_of(lists[1:])
    weights, twin_weights = (Guarded(device, dtype).fill(generator) for _ in range(2))
    squares = adamw.sum_of_squares(gradients)
    assert torch.equal(squares, adamw.sum_of_squares(copies))
    coefficient = plain.coefficient_of(squares.sqrt(), 8.0, 1.0)
    numbers = (coefficient, torch.tensor(3.0, device=device), 1e-2)
    before = lists[1][0].clone()
    adamw.adamw_update_(gradients, *lists[1:], weights, *numbers, **SETTINGS)
    adamw.adamw_update_(copies, *twins, twin_weights, *numbers, **SETTINGS)
    assert not torch.equal(before, lists[1][0])
    for ours, theirs in zip([*lists[1:], weights], [*twins, twin_weights], strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_rate_on_the_device_is_the_rate(moments: torch.dtype, device: torch.device) -> None:
    """Bit for bit what the same number gives as one of the host, and what the formula makes of it."""
    generator = torch.Generator().manual_seed(7)
    lists = [[torch.rand(shape, generator=generator).to(device) for shape in SHAPES] for _ in range(4)]
    lists[2:] = [[tensor.to(moments) for tensor in each] for each in lists[2:]]
    on_host, formula = twins_of(lists), twins_of(lists)
    rate = torch.zeros((), device=device)
    coefficient = torch.full((), 0.5, device=device)
    for number in range(1, 4):
        rate.fill_(1e-2 / number)
        step = torch.tensor(float(number), device=device)
        for update, state, given in (
            (adamw.adamw_update_, lists, rate),
            (adamw.adamw_update_, on_host, rate.item()),
            (plain.adamw_update_reference_, formula, rate),
        ):
            update(*state, [], coefficient, step, given, **SETTINGS, seed=5)
    for ours, same, theirs in zip(lists, on_host, formula, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, same, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if theirs[0].dtype == moments else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_update_reads_what_stands_on_the_device(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays, with another rate and gradient each, write what the update itself writes. On a GPU of a CUDA graph."""
    outcomes = []
    for warm_up in (2, 10**9):
        monkeypatch.setattr(graphs, "WARM_UP", warm_up)
        generator = torch.Generator().manual_seed(8)
        gradients, weights = Guarded(device, dtype).tensors, Guarded(device, torch.bfloat16).fill(generator)
        masters, averages, squares = (Guarded(device).fill(generator) for _ in range(3))
        torch._foreach_abs_(squares)
        rate, step = torch.zeros((), device=device), torch.zeros((), device=device)

        def update(lists=(gradients, masters, averages, squares, weights), rate=rate, step=step) -> Tensor:
            step.add_(1)
            total = adamw.sum_of_squares(lists[0])
            adamw.adamw_update_(*lists, plain.coefficient_of(total.sqrt(), 1.0, 1.0), step, rate, **SETTINGS)
            return total

        piece = graphs.Piece(graphs.CudaRecorder(device) if device.type == "cuda" else TapeRecorder(), update)
        totals = []
        for number in range(5):
            rate.fill_(1e-2 / (number + 1))
            for tensor in gradients:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            totals.append(piece().clone())
        assert piece.is_recorded == (warm_up == 2)
        outcomes.append([*totals, *masters, *averages, *squares, *weights])
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    assert len({float(total) for total in outcomes[0][:5]}) == 5


def test_a_table_serves_as_long_as_its_tensors_lie_where_they_lay(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(adamw, "_made", lambda *what, make=adamw._made: made.append(what) or make(*what))
    monkeypatch.setattr(adamw, "_tables", {})
    monkeypatch.setattr(adamw, "_MOST_TABLES", 2)
    one, two, three = ([torch.full((5,), float(value), device=device)] for value in (1, 2, 3))
    for tensors, expected, number in (
        (one, 5, 1),
        (two, 20, 2),
        (one, 5, 2),
        (three, 45, 3),
        (one, 5, 3),
        (two, 20, 4),
    ):
        assert adamw.sum_of_squares(tensors) == expected
        assert len(made) == number
    assert len(adamw._tables) == 2


def test_moments_in_bf16_are_rounded_by_the_same_bits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    lists = [[torch.rand(shape, generator=generator).to(device) for shape in SHAPES] for _ in range(4)]
    lists[2:] = [[tensor.bfloat16() for tensor in each] for each in lists[2:]]
    twins = [[tensor.clone() for tensor in each] for each in lists]
    coefficient = torch.full((), 0.5, device=device)
    for number in range(1, 4):
        step = torch.tensor(float(number), device=device)
        for update, state in ((adamw.adamw_update_, lists), (plain.adamw_update_reference_, twins)):
            update(*state, [], coefficient, step, 1e-2, **SETTINGS, seed=-7, first=3)
    changed = 0
    for ours, theirs in zip(lists[2] + lists[3], twins[2] + twins[3], strict=True):
        assert ours.dtype == torch.bfloat16
        changed += int((ours != theirs).sum())  # the last bit of fp32 arithmetic may tip a value over
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
    assert changed <= 2
    for ours, theirs in zip(lists[1], twins[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, device: torch.device) -> None:
    """1e38 is finite, and its square is not in fp32."""
    generator = torch.Generator().manual_seed(2)
    lists = [Guarded(device).fill(generator) for _ in range(4)]
    weights = Guarded(device, torch.bfloat16).fill(generator)
    lists[0][3][2, 1] = poison
    before = [[tensor.clone() for tensor in each] for each in [*lists[1:], weights]]
    norm = adamw.sum_of_squares(lists[0]).sqrt()
    assert not torch.isfinite(norm)
    step = torch.tensor(2.0, device=device)
    adamw.adamw_update_(*lists, weights, plain.coefficient_of(norm, 1.0, 1.0), step, 1e-2, **SETTINGS)
    for old, new in zip(before, [*lists[1:], weights], strict=True):
        assert all(torch.equal(*pair) for pair in zip(old, new, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_squares(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = Guarded(device, dtype).fill(generator)
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    first, again = adamw.sum_of_squares(tensors), adamw.sum_of_squares(tensors)
    torch.testing.assert_close(first, exact, rtol=1e-6, atol=0)
    assert torch.equal(first, again)
    torch.testing.assert_close(plain.sum_of_squares([tensor.float() for tensor in tensors]), exact, rtol=1e-6, atol=0)


def test_one_flat_buffer(device: torch.device) -> None:
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(4)).to(device)
    torch.testing.assert_close(adamw.sum_of_squares([flat]), flat.double().square().sum(), rtol=1e-6, atol=0)


def test_nothing_at_all(device: torch.device) -> None:
    empty, one = torch.empty(0, device=device), torch.ones((), device=device)
    assert adamw.sum_of_squares([empty, empty]) == 0
    adamw.adamw_update_(*[[empty]] * 4, [], one, one, 1e-2, **SETTINGS)


def test_the_operators_are_registered_well(device: torch.device) -> None:
    lists = [[torch.rand(2, 3, device=device), torch.rand(4, device=device)] for _ in range(4)]
    weights = [tensor.bfloat16() for tensor in lists[0]]
    one = torch.ones((), device=device)
    torch.library.opcheck(adamw.sum_of_squares, (lists[0],))
    for rates in (None, torch.rand(2, device=device)):
        numbers = (one, one, rates, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        torch.library.opcheck(adamw.adamw_step, (*lists, weights, *numbers))
