"""Each optimizer against its formula, written out for one tensor, over several steps with several settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config.resolve import resolve
from megatron.errors import ConfigError
from megatron.optim.base import StatefulOptimizer
from megatron.optim.build import KINDS, build_optimizer, initial_state, optimizer_kind

STEPS = 6
WEIGHT_DECAY = 0.2


def adam(p: Tensor, gradients: list[Tensor], decay: float, lr: float, betas=(0.9, 0.999), eps=1e-8) -> Tensor:
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        p = p * (1 - lr * decay)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


def sgd(p: Tensor, gradients: list[Tensor], decay: float, lr: float, momentum=0.0, nesterov=False) -> Tensor:
    m = torch.zeros_like(p)
    for gradient in gradients:
        g = gradient + decay * p
        m = momentum * m + g
        p = p - lr * (g + momentum * m if nesterov else m)
    return p


def lion(p: Tensor, gradients: list[Tensor], decay: float, lr: float, betas=(0.9, 0.99)) -> Tensor:
    m = torch.zeros_like(p)
    for g in gradients:
        p = p * (1 - lr * decay) - lr * torch.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
    return p


def madgrad_wd(p: Tensor, gradients: list[Tensor], decay: float, lr: float, momentum=0.9, eps=1e-6) -> Tensor:
    s, v, x0 = torch.zeros_like(p), torch.zeros_like(p), p
    for k, g in enumerate(gradients):
        weight = (lr + eps) * math.sqrt(k + 1)
        p = p * (1 - (lr + eps) * decay)
        if momentum == 0:
            x0 = p + s / (v ** (1 / 3) + eps)
        v, s = v + weight * g * g, s + weight * g
        z = x0 - s / (v ** (1 / 3) + eps)
        p = momentum * p + (1 - momentum) * z
    return p


def sm3(p: Tensor, gradients: list[Tensor], decay: float, lr: float, momentum=0.0, beta=0.0, eps=1e-30) -> Tensor:
    """For a matrix, element by element; `decay` does not exist."""
    rows, columns = [0.0] * p.shape[0], [0.0] * p.shape[1]
    m = torch.zeros_like(p)
    p = p.clone()
    for g in gradients:
        nu = torch.zeros_like(p)
        for i in range(p.shape[0]):
            for j in range(p.shape[1]):
                least = min(rows[i], columns[j])
                nu[i, j] = (beta if beta > 0 else 1.0) * least + (1 - beta) * g[i, j] ** 2
        rows = [max(rows[i] if beta > 0 else 0.0, nu[i].max().item()) for i in range(p.shape[0])]
        columns = [max(columns[j] if beta > 0 else 0.0, nu[:, j].max().item()) for j in range(p.shape[1])]
        m = momentum * m + (1 - momentum) * g / (nu + eps).sqrt()
        p -= lr * m
    return p


CASES: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
    ("adam", adam, {"lr": 1e-2}),
    ("adamw", adam, {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-6}),
    ("cpu_torch_adam", adam, {"lr": 1e-2}),
    ("sgd", sgd, {"lr": 1e-1}),
    ("sgd", sgd, {"lr": 1e-1, "momentum": 0.9}),
    ("sgd", sgd, {"lr": 1e-1, "momentum": 0.9, "nesterov": True}),
    ("lion", lion, {"lr": 1e-2}),
    ("lion", lion, {"lr": 1e-2, "betas": [0.95, 0.98]}),
    ("madgrad_wd", madgrad_wd, {"lr": 1e-2}),
    ("madgrad_wd", madgrad_wd, {"lr": 1e-2, "momentum": 0.0, "eps": 1e-4}),
    ("sm3", sm3, {"lr": 1e-1}),
    ("sm3", sm3, {"lr": 1e-1, "momentum": 0.9, "beta": 0.9}),
]


def config(kind: str, params: dict[str, Any], weight_decay: float = WEIGHT_DECAY):
    return resolve(
        {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "seq_length": 8,
            "max_position_embeddings": 8,
            "train_iters": 10,
            "optimizer": {"type": kind, "params": params},
            "weight_decay": 0.0 if kind == "sm3" else weight_decay,
        }
    )


def gradients_of(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(STEPS)]


@pytest.mark.parametrize(("kind", "formula", "params"), CASES)
def test_the_formula(kind, formula, params):
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(start.clone())
    optimizer = build_optimizer(config(kind, params), [("weight", weight)])
    gradients = gradients_of((5, 3))
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    expected = formula(start.double(), [g.double() for g in gradients], WEIGHT_DECAY, **params)
    torch.testing.assert_close(weight.detach(), expected.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("kind", "formula", "params"), CASES)
def test_state_made_before_the_first_step_changes_nothing(kind, formula, params):
    """Lazily created state and ours at step 0 lead to the same bits, and to entries of the same names and shapes."""
    weights, states = [], []
    for eager in (False, True):
        weight = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
        optimizer = build_optimizer(config(kind, params), [("weight", weight)])
        if eager:
            (group,) = optimizer.param_groups
            optimizer.state[weight] = initial_state(optimizer, weight.detach(), group)
        for gradient in gradients_of((5, 3)):
            weight.grad = gradient.clone()
            optimizer.step()
        weights.append(weight.detach())
        states.append({k: torch.as_tensor(v) for k, v in optimizer.state[weight].items() if v is not None})
    assert torch.equal(*weights)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if row.elementwise])
def test_what_is_called_elementwise_may_be_cut_anywhere(kind):
    """ZeRO hands over flat slices: updating two slices equals updating the whole."""
    ours = config(kind, {"lr": 1e-2})
    start, gradients = torch.randn(14, generator=torch.Generator().manual_seed(1)), gradients_of((14,))
    results = []
    for cuts in ((14,), (5, 9)):
        parts = [nn.Parameter(part.clone()) for part in start.split(cuts)]
        optimizer = build_optimizer(ours, [(str(i), part) for i, part in enumerate(parts)])
        for gradient in gradients:
            for part, piece in zip(parts, gradient.split(cuts), strict=True):
                part.grad = piece.clone()
            optimizer.step()
        results.append(torch.cat([part.detach() for part in parts]))
    assert torch.equal(*results)


def test_sm3_takes_tensors_of_any_number_of_dims():
    for shape in ((4,), (2, 3, 4)):
        weight = nn.Parameter(torch.ones(shape))
        optimizer = build_optimizer(config("sm3", {"lr": 0.1}), [("w", weight)])
        weight.grad = torch.full(shape, 2.0)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full(shape, 0.9))
        assert {k: v.numel() for k, v in optimizer.state[weight].items()} == {
            f"accumulator_{dim}": length for dim, length in enumerate(shape)
        }


def test_a_closure_is_evaluated_with_gradients():
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(config("lion", {"lr": 0.1}, weight_decay=0.0), [("w", weight)])
    assert isinstance(optimizer, StatefulOptimizer)

    def closure() -> float:
        loss = (weight * 2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_one_bit_adam_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.type"):
        optimizer_kind(config("onebitadam", {"lr": 1e-3}))
