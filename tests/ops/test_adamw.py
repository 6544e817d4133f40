"""AdamW's update and its formula equal torch.optim.AdamW with torch's own clipping, and skip what is not finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops import adamw
from megatron.ops.adamw import (
    adamw_update_,
    adamw_update_reference_,
    bias_corrections,
    coefficient_of,
    noise,
    noise_key,
    sum_of_squares,
)

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (7,))]


UPDATES = [adamw_update_, adamw_update_reference_]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_steps(clip: float, loss_scale: float, update: Callable[..., None]) -> None:
    masters, averages, squares = draw(0), *([torch.zeros_like(each) for each in draw(0)] for _ in range(2))
    weights = [master.bfloat16() for master in masters]
    twins = [master.clone().requires_grad_() for master in masters]
    optimizer = torch.optim.AdamW(twins, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(1, 5):
        gradients = draw(number)
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        expected = torch.nn.utils.clip_grad_norm_(twins, clip or 1e9)
        optimizer.step()
        scaled = [loss_scale * gradient for gradient in gradients]
        norm = sum_of_squares(scaled).sqrt() / loss_scale
        torch.testing.assert_close(norm.float(), expected)
        coefficient = coefficient_of(norm, loss_scale, clip)
        step = torch.tensor(float(number))
        update(scaled, masters, averages, squares, weights, coefficient, step, 1e-2, **SETTINGS)
    for index, twin in enumerate(twins):
        torch.testing.assert_close(masters[index], twin.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averages[index], optimizer.state[twin]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(squares[index], optimizer.state[twin]["exp_avg_sq"], rtol=1e-5, atol=1e-6)
        assert torch.equal(weights[index], masters[index].bfloat16())


@pytest.mark.parametrize("converted", [2**24, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", UPDATES)
def test_halves_count_as_their_fp32_copies(
    update: Callable[..., None], dtype: torch.dtype, converted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "_CONVERTED", converted)
    gradients, found = [(300.0 * gradient).to(dtype) for gradient in draw(1)], []
    for given in (gradients, [gradient.float() for gradient in gradients]):
        squares = sum_of_squares(given)
        lists = [draw(0), *([torch.zeros_like(each) for each in draw(0)] for _ in range(2))]
        weights = [master.to(dtype) for master in lists[0]]
        coefficient = coefficient_of(squares.sqrt(), 1.0, 0.5)
        update(given, *lists, weights, coefficient, torch.tensor(1.0), 1e-2, **SETTINGS)
        found.append([squares, *(tensor for each in (*lists, weights) for tensor in each)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("update", UPDATES)
def test_a_rate_on_the_device_is_the_rate(update: Callable[..., None]) -> None:
    rate, coefficient = torch.zeros(()), torch.ones(())
    found, expected = ([draw(seed) for seed in (1, 2, 3)] for _ in range(2))
    for lists in (found, expected):
        lists.append([tensor.abs() for tensor in draw(4)])
    for number in (1, 2):
        rate.fill_(1e-2 / number)
        step = torch.tensor(float(number))
        for lists, given in ((found, rate), (expected, rate.item())):
            update(*lists, [], coefficient, step, given, **SETTINGS)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(value: float, update: Callable[..., None]) -> None:
    gradients = draw(1)
    gradients[0][1, 1] = value
    lists = [draw(seed) for seed in (2, 3, 4)]
    before = [[tensor.clone() for tensor in each] for each in lists]
    coefficient = coefficient_of(sum_of_squares(gradients).sqrt(), 1.0, 1.0)
    assert coefficient.isnan()
    update(gradients, *lists, [], coefficient, torch.tensor(0.0), 1e-2, **SETTINGS)
    for old, new in zip(before, lists, strict=True):
        assert all(torch.equal(*pair) for pair in zip(old, new, strict=True))


def test_the_coefficient_undoes_the_scale_and_clips() -> None:
    norm = torch.tensor(1.5, dtype=torch.float64)
    assert coefficient_of(norm, 2.0, 0.0) == 0.5
    assert coefficient_of(norm, 2.0, 3.0) == 0.5
    assert coefficient_of(norm, 2.0, 0.75).item() == pytest.approx(0.25, rel=1e-6)


def test_bias_corrections_are_exact_at_the_first_step() -> None:
    torch.testing.assert_close(bias_corrections(torch.tensor(1.0), 0.9, 0.999), torch.tensor([10.0, 1000**0.5]))


def compact(seed: int = 3, steps: int = 40, beta2: float = 0.999, first: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return averages and squares in bf16 after some updates with a gradient of 1."""
    masters, averages, squares = [torch.zeros(4096)], *([torch.zeros(4096, dtype=torch.bfloat16)] for _ in range(2))
    for number in range(1, steps + 1):
        coefficient, step = torch.ones(()), torch.tensor(float(number))
        lists = [torch.ones(4096)], masters, averages, squares, []
        adamw_update_(*lists, coefficient, step, 1e-3, 0.9, beta2, 1e-8, 0.0, seed, first)
    return averages, squares


def test_moments_in_bf16_are_right_in_the_mean() -> None:
    """Rounded to the nearest, the square would stop growing: from 0.25 on an update adds less than half a step."""
    (average,), (square,) = compact(steps=600)
    exact = 1 - 0.999**600
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(600):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert abs(float(nearest) - exact) > 0.1 * exact
    assert float(square.float().mean()) == pytest.approx(exact, rel=3e-3)
    assert float(average.float().mean()) == pytest.approx(1.0, rel=3e-3)
    assert len(square.unique()) > 1, "elements are rounded one by one"


def test_rounding_follows_from_seed_step_and_tensor_alone() -> None:
    one, again = compact(), compact()
    assert all(torch.equal(*pair) for pair in zip(one[1], again[1], strict=True))
    for other in (compact(seed=4), compact(first=1)):
        assert not torch.equal(one[1][0], other[1][0])


def test_random_bits_are_even() -> None:
    bits = noise(noise_key(1, torch.tensor(5.0)), 2, 0, 2**16)
    shares = [((bits >> shift) & 1).double().mean().item() for shift in range(32)]
    assert all(abs(share - 0.5) < 0.01 for share in shares)
    assert torch.equal(noise(noise_key(1, torch.tensor(5.0)), 2, 100, 50), bits[100:150])
