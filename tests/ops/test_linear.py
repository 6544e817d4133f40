"""Linear maps by oneDNN equal PyTorch's, gradients included; dtype and shape alone say which of them computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import linear as module
from megatron.ops.linear import linear, linear_reference, onednn_wins, product, product_into

ROWS, INPUTS, OUTPUTS = 33, 20, 27


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every fp32 product goes to oneDNN; returns a list that grows by one with each."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this build of torch is without oneDNN")
    calls: list[int] = []
    compute = module._by_onednn

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return compute(*arguments)

    monkeypatch.setattr(module, "onednn_wins", lambda: True)
    monkeypatch.setattr(module, "SMALLEST", 0)
    monkeypatch.setattr(module, "NARROWEST", 0)
    monkeypatch.setattr(module, "_by_onednn", counted)
    return calls


def draw(bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Return the same inputs [3, 11, in], weight and bias at every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, ROWS // 3, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,)]
    drawn: list[Tensor | None] = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    return drawn if bias else [*drawn[:2], None]


def gradients(leaves: list[Tensor | None]) -> list[Tensor | None]:
    return [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_pytorchs(by_onednn: list[int], bias: bool) -> None:
    ours, theirs = draw(bias), draw(bias)
    output, expected = linear(*ours), linear_reference(*theirs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    for found, right in zip(gradients(ours), gradients(theirs), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4 * float(right.abs().max()))
    assert len(by_onednn) == 3


def test_a_layer_used_twice_sums_its_gradients(by_onednn: list[int]) -> None:
    ours, theirs = draw(True), draw(True)
    square = torch.randn(INPUTS, OUTPUTS)
    for leaves, function in ((ours, linear), (theirs, linear_reference)):
        function(torch.tanh(function(*leaves)) @ square.t(), *leaves[1:]).sum().backward()
    for found, right in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)
    assert len(by_onednn) == 6


def test_inputs_and_gradients_of_any_layout(by_onednn: list[int]) -> None:
    _, weight, bias = draw(True)
    layouts = [
        torch.randn(INPUTS, ROWS).t(),
        torch.randn(ROWS, 2 * INPUTS)[:, ::2],
        torch.randn(1, INPUTS).expand(ROWS, -1),
    ]
    for inputs in layouts:
        ours, theirs = (inputs.detach().requires_grad_() for _ in range(2))
        # The gradient of a sum is one number, expanded.
        linear(ours, weight, bias).sum().backward()
        linear_reference(theirs, weight, bias).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        # A transposed gradient.
        linear(ours, weight, bias).t().contiguous().square().sum().backward()
        linear_reference(theirs, weight, bias).t().contiguous().square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4)
    assert by_onednn


@pytest.mark.parametrize("frozen", range(3))
def test_what_needs_no_gradient_gets_none(by_onednn: list[int], frozen: int) -> None:
    leaves = draw(True)
    leaves[frozen].requires_grad_(False)
    linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [index == frozen for index in range(3)]
    assert len(by_onednn) == (3 if frozen == 2 else 2)


def test_without_gradients(by_onednn: list[int]) -> None:
    leaves = draw(True)
    with torch.inference_mode():
        torch.testing.assert_close(linear(*leaves), linear_reference(*leaves), rtol=1e-5, atol=1e-5)
    assert len(by_onednn) == 1


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_products(by_onednn: list[int], transposed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    left = torch.randn(INPUTS, ROWS).t() if transposed[0] else torch.randn(ROWS, INPUTS)
    right = torch.randn(OUTPUTS, INPUTS).t() if transposed[1] else torch.randn(INPUTS, OUTPUTS)
    expected = (left.double() @ right.double()).float()
    torch.testing.assert_close(product(left, right), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * ROWS * 5)
    output = torch.full((ROWS, 2 * OUTPUTS), float("nan"))[:, ::2]
    assert product_into(output, left, right) is output
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert len(by_onednn) == 1 + 6


def test_other_dtypes_are_pytorchs(by_onednn: list[int]) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        leaves = draw(True, dtype)
        output = linear(*leaves)
        assert torch.equal(output, linear_reference(*leaves))
        output.sum().backward()
        assert leaves[1].grad.dtype == dtype
    assert not by_onednn


def test_mixed_dtypes_are_refused_as_by_pytorch(by_onednn: list[int]) -> None:
    inputs, weight, _ = draw(False)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(inputs, weight.bfloat16())


def test_what_only_pytorch_knows_is_its_own(by_onednn: list[int]) -> None:
    class Special(torch.Tensor):
        pass

    inputs, weight, bias = (leaf.detach() for leaf in draw(True))
    for arguments in (
        (inputs.as_subclass(Special), weight, bias),
        (inputs, weight, bias[:1]),
        (torch._neg_view(inputs), weight, bias),
    ):
        found = linear(*arguments)
        assert torch.equal(found, linear_reference(*arguments))
        assert type(found) is type(arguments[0])
    assert not by_onednn
    with pytest.raises(RuntimeError, match="shape"):
        linear(inputs, weight[:, 1:])
    with pytest.raises(RuntimeError, match="dtype"):
        linear(inputs, weight, bias.bfloat16())


def test_without_onednn(by_onednn: list[int]) -> None:
    leaves = draw(True)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(*leaves), linear_reference(*leaves))
        assert torch.equal(product(leaves[0].flatten(0, 1), leaves[1].t()), leaves[0].flatten(0, 1) @ leaves[1].t())
    assert not by_onednn


def test_a_build_or_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for changed in (
        lambda patch: patch.setattr(torch.backends.mkldnn, "is_available", lambda: False),
        lambda patch: patch.setattr(module, "_maker", lambda: "GenuineIntel"),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
    ):
        with monkeypatch.context() as patch:
            changed(patch)
            onednn_wins.cache_clear()
            assert not onednn_wins()
    onednn_wins.cache_clear()


def test_small_and_narrow_products_are_pytorchs(by_onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(ROWS, INPUTS), torch.randn(INPUTS, OUTPUTS)
    monkeypatch.setattr(module, "NARROWEST", OUTPUTS + 1)
    product(left.t().contiguous().t(), right)
    assert not by_onednn
    monkeypatch.setattr(module, "SMALLEST", ROWS * INPUTS * OUTPUTS)
    product(left, right)
    assert len(by_onednn) == 1
    monkeypatch.setattr(module, "SMALLEST", ROWS * INPUTS * OUTPUTS + 1)
    product(left, right)
    assert len(by_onednn) == 1
