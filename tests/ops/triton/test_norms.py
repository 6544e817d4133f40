"""The norms' kernels equal the formulae in fp64, gradients included, at any width and in any memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron.ops import norms as formulae
from megatron.ops.triton import norms
from tests.ops.triton.agree import DTYPES, check, draw, scattered


def exact_layer_norm(inputs: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centred = inputs - inputs.mean(-1, keepdim=True)
    output = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def exact_rms_norm(inputs: Tensor, weight: Tensor) -> Tensor:
    return inputs / torch.sqrt(inputs.square().mean(-1, keepdim=True) + 1e-3) * weight


def layer_norm(inputs: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return norms.layer_norm(inputs, inputs.shape[-1:], weight, bias, 1e-3)


@pytest.fixture(params=["whole", "wide"])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A row in the registers of one program, or one that is read in chunks."""
    if request.param == "whole":
        return 33
    monkeypatch.setattr(norms, "WHOLE_FORWARD", 32)
    monkeypatch.setattr(norms, "WHOLE_BACKWARD", 32)
    monkeypatch.setattr(norms, "CHUNK", 16)
    return 45


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, weight, bias = draw(device, dtype, (2, 3, width), (width,), (width,))
    check(layer_norm, exact_layer_norm, [inputs, weight, bias])
    check(layer_norm, exact_layer_norm, [scattered(inputs), weight])
    check(layer_norm, exact_layer_norm, [inputs[1:].detach().transpose(0, 1).requires_grad_()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, weight = draw(device, dtype, (7, width), (width,))
    check(lambda x, w: norms.rms_norm(x, w, 1e-3), exact_rms_norm, [inputs, weight])
    check(lambda x, w: norms.rms_norm(x, w, 1e-3), exact_rms_norm, [scattered(inputs), weight])


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_residual(width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, residual, weight, bias = draw(device, dtype, (5, width), (5, width), (width,), (width,))

    def total(one: Tensor, two: Tensor) -> Tensor:
        """The sum as it is stored, so that its rounding is no difference; the interpreter cuts what a GPU rounds."""
        rounded = norms.add_rms_norm(inputs.detach(), residual.detach(), weight.detach(), 1e-3)[1].double()
        return (one + two) + (rounded - (one + two)).detach()

    check(
        lambda x, r, w, b: norms.add_layer_norm(x, r, w, b, 1e-3),
        lambda x, r, w, b: (exact_layer_norm(total(x, r), w, b), total(x, r)),
        [inputs, scattered(residual), weight, bias],
    )
    check(
        lambda x, r, w: norms.add_rms_norm(x, r, w, 1e-3),
        lambda x, r, w: (exact_rms_norm(total(x, r), w), total(x, r)),
        [scattered(inputs), residual, weight],
    )


def test_the_sum_is_that_of_the_formula(device: torch.device) -> None:
    inputs, residual, weight = draw(device, torch.float16, (5, 9), (5, 9), (9,))
    _, total = norms.add_rms_norm(inputs, residual, weight, 1e-3)
    assert torch.equal(total, formulae.add_rms_norm(inputs, residual, weight, 1e-3)[1])


def test_layer_norm_over_two_dims(device: torch.device) -> None:
    inputs, weight, bias = draw(device, torch.float32, (2, 3, 4, 5), (4, 5), (4, 5))
    expected = formulae.layer_norm_reference(inputs, (4, 5), weight, bias, 1e-3)
    torch.testing.assert_close(norms.layer_norm(inputs, (4, 5), weight, bias, 1e-3), expected)


def test_a_mean_far_from_zero_costs_no_digits(width: int, device: torch.device) -> None:
    (inputs,) = draw(device, torch.float32, (3, width))
    check(layer_norm, exact_layer_norm, [(inputs.detach() + 1000).requires_grad_()], tolerance=1e-3)


def test_only_one_of_two_outputs_is_used(device: torch.device) -> None:
    tensors = draw(device, torch.float32, (3, 8), (3, 8), (8,))
    for used in (0, 1):
        found = [
            torch.autograd.grad(function(*tensors, 1e-3)[used].square().sum(), tensors[:2])
            for function in (norms.add_rms_norm, formulae.add_rms_norm_reference)
        ]
        torch.testing.assert_close(*found)


def test_rows_beyond_the_programs_and_gradients_alike_each_time(device: torch.device) -> None:
    tensors = draw(device, torch.float32, (70, 12), (12,))
    kernel = partial(norms.rms_norm, eps=1e-3)
    check(kernel, exact_rms_norm, tensors)
    first, second = (torch.autograd.grad(kernel(*tensors).sin().sum(), tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_rows(device: torch.device) -> None:
    inputs, weight = draw(device, torch.float32, (0, 8), (8,))
    norms.rms_norm(inputs, weight, 1e-3).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("centred", [True, False])
def test_operators(centred: bool, device: torch.device) -> None:
    inputs, residual, weight, bias = (each.detach() for each in draw(device, torch.float32, (5, 9), (5, 9), (9,), (9,)))
    arguments = (inputs, residual, weight, bias if centred else None, 1e-3, centred)
    torch.library.opcheck(torch.ops.deepy.norm_forward.default, arguments)
    _, total, mean, scale = torch.ops.deepy.norm_forward(*arguments)
    arguments = (inputs, residual, total, weight, mean, scale, centred)
    torch.library.opcheck(torch.ops.deepy.norm_backward.default, arguments)


def test_compiled_without_a_break_in_the_graph(device: torch.device) -> None:
    tensors = draw(device, torch.float32, (5, 9), (5, 9), (9,))

    def function(inputs: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total = norms.add_rms_norm(inputs * 2, residual, weight, 1e-3)
        return (normed * total).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(each(*tensors), tensors) for each in (compiled, function)]
    torch.testing.assert_close(*found)
