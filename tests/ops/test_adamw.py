"""The formula of AdamW equals torch.optim.AdamW with torch's own clipping, and skips what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.adamw import adamw_update_, step_scalars, sum_of_squares

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (7,))]


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_steps(clip: float, loss_scale: float) -> None:
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
        scalars = step_scalars(norm, torch.tensor(float(number)), loss_scale, clip, 0.9, 0.95)
        adamw_update_(scaled, masters, averages, squares, weights, scalars, 1e-2, **SETTINGS)
    for index, twin in enumerate(twins):
        torch.testing.assert_close(masters[index], twin.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averages[index], optimizer.state[twin]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(squares[index], optimizer.state[twin]["exp_avg_sq"], rtol=1e-5, atol=1e-6)
        assert torch.equal(weights[index], masters[index].bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(value: float) -> None:
    gradients = draw(1)
    gradients[0][1, 1] = value
    lists = [draw(seed) for seed in (2, 3, 4)]
    before = [[tensor.clone() for tensor in each] for each in lists]
    norm = sum_of_squares(gradients).sqrt()
    scalars = step_scalars(norm, torch.tensor(0.0), 1.0, 1.0, 0.9, 0.95)
    assert not scalars[0].isfinite()
    adamw_update_(gradients, *lists, [], scalars, 1e-2, **SETTINGS)
    for old, new in zip(before, lists, strict=True):
        assert all(torch.equal(*pair) for pair in zip(old, new, strict=True))
