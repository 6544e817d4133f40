"""Activations and the gradients of input and bias are those of the formula in fp64, at any width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import activations
from megatron.ops.cpu import activations as kernels
from megatron.ops.cpu import library

NAMES = ["bias_gelu", "bias_gelu_tanh", "bias_swiglu", "bias_geglu"]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def draw(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(*rows, width, generator=generator).mul_(3).to(dtype).requires_grad_()
    return inputs, torch.randn(width, generator=generator).to(dtype).requires_grad_()


def compare(name: str, inputs: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Compare with the formula in fp64; the bias' gradient by its own size, as a sum over rows."""
    leaves = [inputs] if bias is None else [inputs, bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = getattr(kernels, name)(inputs, bias)
    wanted = getattr(activations, name)(exact[0], None if bias is None else exact[1])
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients = torch.autograd.grad(found, leaves, upstream)
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype]
    for one, other in zip((found, *gradients), (wanted, *expected), strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=2 * tolerance, atol=tolerance * min(scale, 8.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "width"), [((3, 5), 38), ((131,), 34), ((1,), 2), ((65,), 256)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(name: str, dtype: torch.dtype, rows: tuple[int, ...], width: int, biased: bool) -> None:
    inputs, bias = draw(rows, width, dtype)
    compare(name, inputs, bias if biased else None, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_not_in_rows(name: str) -> None:
    wide = torch.randn(7, 5, 90, generator=torch.Generator().manual_seed(1))
    compare(name, wide.transpose(0, 1)[..., 3:79].detach().requires_grad_(), None, torch.float32)


@pytest.mark.parametrize(("name", "error"), [("bias_gelu", 4e-7), ("bias_gelu_tanh", 4e-7)])
def test_the_stated_error_over_all_of_the_line(name: str, error: float) -> None:
    x = torch.linspace(-30, 30, 200001).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, wanted = getattr(kernels, name)(x, None), getattr(activations, name)(exact, None)
    assert ((found.double() - wanted).abs() / exact.abs().clamp(min=1)).max() < error
    (slope,), (expected,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), exact)
    assert (slope.double() - expected).abs().max() < 20 * error


def test_what_is_no_number_stays_so_and_what_is_large_saturates() -> None:
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e4, 0.0])
    for name in NAMES[:2]:
        found = getattr(kernels, name)(x, None)
        assert found[0].isnan()
        assert found[1:].tolist() == [float("inf"), x[2].item(), 0.0, 0.0]
    gates = torch.stack([torch.ones(5), x]).t().reshape(5, 2)
    for name in NAMES[2:]:
        found = getattr(kernels, name)(gates, None).flatten()
        assert found[0].isnan()
        assert found[1:].tolist() == [float("inf"), x[2].item(), 0.0, 0.0]


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    for name in NAMES:
        results = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                inputs, bias = draw((700,), 130, torch.bfloat16)
                output = getattr(kernels, name)(inputs, bias)
                results.append([output, *torch.autograd.grad(output.float().square().sum(), (inputs, bias))])
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_or_of_other_dtypes_is_pytorchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernel", None)
    inputs, bias = draw((3,), 8, torch.float32)
    expected = getattr(activations, name)(inputs, bias)
    compiled = torch.compile(getattr(kernels, name), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs, bias), expected)
    torch.testing.assert_close(getattr(kernels, name)(inputs.double(), bias.double()).float(), expected)
    assert getattr(kernels, name)(inputs.bfloat16(), bias).dtype == torch.float32, "as PyTorch promotes them"


def test_a_bias_for_all_features_is_not_read_beyond_its_end() -> None:
    inputs, bias = torch.randn(4, 32), torch.ones(1)
    assert torch.equal(kernels.bias_gelu(inputs, bias), activations.bias_gelu(inputs, bias))
