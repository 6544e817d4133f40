"""The activations' kernels equal the formulae in fp64, with the bias and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops import activations as formulae
from megatron.ops.triton import activations
from tests.ops.triton.agree import DTYPES, check, draw, scattered

Function = Callable[[Tensor, Tensor | None], Tensor]


def with_bias(name: str, tanh: bool = False) -> Function:
    return lambda x, b=None: formulae.reference(name, x if b is None else x + b, tanh)


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "bias_gelu": (activations.bias_gelu, with_bias("gelu")),
    "bias_gelu_tanh": (activations.bias_gelu_tanh, with_bias("gelu", tanh=True)),
    "bias_swiglu": (activations.bias_swiglu, with_bias("swiglu")),
    "bias_geglu": (activations.bias_geglu, with_bias("geglu")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_with_and_without_bias(name: str, dtype: torch.dtype, device: torch.device) -> None:
    kernel, formula = FUNCTIONS[name]
    inputs, bias = draw(device, dtype, (2, 3, 38), (38,))
    check(kernel, formula, [inputs, bias])
    check(lambda x: kernel(x, None), formula, [scattered(inputs)])
    check(lambda x: kernel(x, None), formula, [inputs.detach().transpose(0, 1).requires_grad_()])


@pytest.mark.parametrize("name", ["bias_gelu", "bias_swiglu"])
def test_more_rows_and_columns_than_one_tile(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_tile", lambda width, elements: (2, 16))
    kernel, formula = FUNCTIONS[name]
    check(kernel, formula, draw(device, torch.float32, (19, 46), (46,)))
    check(lambda x: kernel(x, None), formula, draw(device, torch.float32, (19, 46)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_far_from_zero_nothing_overflows(name: str, device: torch.device) -> None:
    inputs = torch.tensor([[-1e4, -90.0, -20.0, -6.0, 6.0, 20.0, 90.0, 1e4]], device=device)
    inputs = torch.cat([torch.ones_like(inputs), inputs], dim=1) if "glu" in name else inputs
    inputs.requires_grad_()
    output = FUNCTIONS[name][0](inputs, None)
    torch.testing.assert_close(output, inputs[:, -8:].clamp(min=0) + 0.0, atol=0.05, rtol=0)
    (gradient,) = torch.autograd.grad(output.sum(), inputs)
    torch.testing.assert_close(gradient[:, -8:], (inputs[:, -8:] > 0).float(), atol=0.1, rtol=0)


def test_the_constants_of_the_tanh_form() -> None:
    """They are written out in the kernel: 2 sqrt(2 / pi), that times 0.044715, and three times that."""
    outer = 2 * math.sqrt(2 / math.pi)
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    share = torch.sigmoid(x * (1.5957691216057308 + 0.07135481627265 * x * x))
    torch.testing.assert_close(x * share, torch.nn.functional.gelu(x, approximate="tanh"))
    assert math.isclose(outer, 1.5957691216057308)
    assert math.isclose(outer * 0.044715 * 3, 0.21406444881795, rel_tol=1e-9)


def test_no_rows(device: torch.device) -> None:
    inputs, bias = draw(device, torch.float32, (0, 8), (8,))
    activations.bias_gelu(inputs, bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_operators(gated: bool, biased: bool, device: torch.device) -> None:
    inputs, bias = (each.detach() for each in draw(device, torch.float32, (5, 12), (12,)))
    arguments = (inputs, bias if biased else None, activations.SILU, gated)
    torch.library.opcheck(torch.ops.deepy.activation_forward.default, arguments)
    upstream = torch.ones(5, 6 if gated else 12, device=device)
    torch.library.opcheck(torch.ops.deepy.activation_backward.default, (upstream, *arguments))
