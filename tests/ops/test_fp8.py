"""The float8 linear map equals its formula and torchao's, and errs no more than roundings to 3 and 4 bits may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from megatron.config import float8 as in_the_config
from megatron.ops import fp8
from megatron.ops.linear import linear

INPUTS, OUTPUTS = 48, 80
ROWS = [(32,), (2, 37)]
RECORDED = Path(__file__).with_name("torchao_float8.safetensors")


def draw(rows: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, features: int = INPUTS) -> list[Tensor]:
    """Return x [*rows, in], W [out, in], b [out] and dy [*rows, out] of very different sizes."""
    generator = torch.Generator().manual_seed(rows[0])
    shapes = [(*rows, features), (OUTPUTS, features), (OUTPUTS,), (*rows, OUTPUTS)]
    x, weight, bias, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    values = [3.0 * x, 0.02 * weight, bias, 1e-5 * upstream]
    return [value.to(dtype) for value in values]


def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """Return y and the gradients of x, W and, where there is one, b."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, dy)]


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to that of the exact tensor."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("rows", [(32,), (3, 7), (1,)])
def test_it_is_the_formula(rows: tuple[int, ...]) -> None:
    values = draw(rows)
    found = run(fp8.float8_linear, *values)
    exact = run(fp8.float8_linear_reference, *(value.float() for value in values))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-8 * float(other.abs().max()))


def test_in_fp32_only_the_order_of_sums_differs() -> None:
    values = draw((5, 7), torch.float32)
    found, exact = run(fp8.float8_linear, *values), run(fp8.float8_linear_reference, *values)
    for one, other in zip(found, exact, strict=True):
        assert relative(one, other) < 1e-6


def test_it_errs_as_much_as_its_roundings_may() -> None:
    """A rounding to 4 significant bits errs by 0.026, the root of the mean square; one to 3 bits by twice that."""
    x, weight, _, dy = draw((512,))
    found = run(fp8.float8_linear, x, weight, None, dy)
    exact = run(linear, x.double(), weight.double(), None, dy.double())
    expected = [(2 * 0.026**2) ** 0.5, (0.026**2 + 0.052**2) ** 0.5, (0.026**2 + 0.052**2) ** 0.5]
    for one, other, error in zip(found, exact, expected, strict=True):
        assert 0.7 * error < relative(one, other) < 1.2 * error


def test_the_bias_has_the_exact_gradient_of_its_type() -> None:
    values = draw((64,))
    assert torch.equal(run(fp8.float8_linear, *values)[3], values[3].sum(0))


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The factors of every product within."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "_scaled_mm"):
            left, right = args[-2:] if name == "addmm" else args[:2]
            self.products.append((name, left.dtype, right.dtype))
        return func(*args, **(kwargs or {}))


def test_all_three_products_are_of_float8_tensors() -> None:
    with Recorder() as recorder:
        run(fp8.float8_linear, *draw((32,)))
    small, wide = torch.float8_e4m3fn, torch.float8_e5m2
    assert recorder.products == [
        ("_scaled_mm", small, small), ("_scaled_mm", wide, small), ("_scaled_mm", wide, small)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [fp8.VALUES, fp8.GRADIENTS])
def test_the_scale_takes_the_largest_value_to_the_largest_number(dtype: torch.dtype) -> None:
    for size in (1e-30, 1e-9, 1.0, 3e38):
        values = torch.tensor([[0.3, -1.0, 0.7]]) * size
        small, _, inverse = fp8.cast(values, fp8.measure(values), dtype is fp8.GRADIENTS, True, False)
        assert small.dtype == dtype
        if size > fp8.SMALLEST:
            assert small.float().abs().max() == torch.finfo(dtype).max
        # an overflow of the scale itself is not met: the least number that a scale is made of is 1e-12
        assert torch.isfinite(inverse)
        torch.testing.assert_close(small.float() * inverse, values, rtol=0.13, atol=fp8.SMALLEST)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_seen() -> None:
    x, weight, _, dy = draw((32,))
    assert fp8.float8_linear(0 * x, weight).count_nonzero() == 0
    for wrong in (float("nan"), float("inf")):
        y = fp8.float8_linear(x.index_fill(0, torch.tensor([3]), wrong), weight)
        assert y.isnan().all()
        gradients = run(fp8.float8_linear, x, weight, None, dy.index_fill(0, torch.tensor([3]), wrong))[1:]
        assert all(gradient.isnan().all() for gradient in gradients)


def test_turned_copies_are_filled_up_with_zeros() -> None:
    values = draw((37,))[0]
    small, turned, _ = fp8.cast(values, fp8.measure(values), False, True, True)
    assert turned.shape == (INPUTS, 48)
    assert turned.is_contiguous()
    assert torch.equal(turned[:, :37].float(), small.float().t())
    assert turned[:, 37:].float().count_nonzero() == 0


def test_a_layer_that_does_not_fit_is_computed_without_float8() -> None:
    for features in (INPUTS + 1, INPUTS + 8):
        values = draw((4, 3), features=features)
        for one, other in zip(run(fp8.float8_linear, *values), run(linear, *values), strict=True):
            assert torch.equal(one, other)
    assert in_the_config.MULTIPLE == fp8.MULTIPLE


def test_what_needs_no_gradient_gets_none_and_keeps_nothing() -> None:
    x, weight, bias, dy = draw((32,))
    full = run(fp8.float8_linear, x, weight, bias, dy)
    frozen = x.clone().requires_grad_()
    fp8.float8_linear(frozen, weight, bias).backward(dy)
    assert torch.equal(frozen.grad, full[1])
    trained = weight.clone().requires_grad_()
    fp8.float8_linear(x, trained, bias).backward(dy)
    assert torch.equal(trained.grad, full[2])
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fp8.float8_linear(frozen, weight.requires_grad_(), bias)
    assert sum(kept) - weight.nbytes <= x.numel() + 16, "one byte for each element of x"


def test_any_layout_of_inputs_and_gradients() -> None:
    x, weight, _, dy = draw((32,))
    expected = run(fp8.float8_linear, x, weight, None, dy)
    wide = torch.zeros(32, 2 * INPUTS, dtype=x.dtype)
    wide[:, ::2] = x
    found = run(fp8.float8_linear, wide[:, ::2], weight, None, dy.t().contiguous().t())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    one = torch.ones(32, OUTPUTS, dtype=x.dtype)
    broadcast = run(lambda *leaves: fp8.float8_linear(*leaves).sum(), x, weight, None, torch.tensor(1.0))
    assert torch.equal(broadcast[1], run(fp8.float8_linear, x, weight, None, one)[1])


def test_recomputation_repeats_it_bit_by_bit() -> None:
    x, weight, bias, dy = draw((32,))
    again = lambda *leaves: torch.utils.checkpoint.checkpoint(fp8.float8_linear, *leaves, use_reentrant=False)  # noqa: E731
    found, expected = run(again, x, weight, bias, dy), run(fp8.float8_linear, x, weight, bias, dy)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_torch_compile_traces_it_whole() -> None:
    products = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        products.extend(node for node in graph.graph.nodes if "_scaled_mm" in str(node.target))
        return graph.forward

    compiled = torch.compile(fp8.float8_linear, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    values = draw((32,))
    found, expected = run(compiled, *values), run(fp8.float8_linear, *values)
    assert len(products) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("products", ["float8", "emulated"])
def test_it_is_torchaos_tensorwise_recipe(rows: tuple[int, ...], products: str) -> None:
    """As recorded by record_torchao.py, of its own float8 products and of those that it emulates in bf16."""
    x, weight, _, dy = draw(rows)
    recorded = load_file(RECORDED)
    for name, one in zip(("y", "dx", "dw"), run(fp8.float8_linear, x, weight, None, dy), strict=True):
        other = recorded[f"{rows} {products} {name}"]
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-8 * float(other.abs().max()))
        if products == "float8":  # at most the order of a sum differs
            assert relative(one, other) < 2**-9


def test_a_gpu_without_float8_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    gpu = torch.device("cuda", 0)
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert bool(fp8.obstacle(gpu)) == refused
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.obstacle(gpu) == (
        "NVIDIA A100-SXM4-80GB has compute capability 8.0, and float8 products need 8.9 (Ada), 9.0 (Hopper) or later."
    )
    assert fp8.obstacle(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert fp8.obstacle(gpu).startswith("GPUs of AMD have other float8 types")
