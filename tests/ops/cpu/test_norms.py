"""Norms, the sums before them and all gradients are those of the formula in fp64, at any width and in any memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.model.made_again import made_again
from megatron.ops import norms as formulae
from megatron.ops.cpu import library
from megatron.ops.cpu import norms as kernels

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(3, 5, 38), (70, 130), (1, 64), (129, 7), (33, 17), (6, 112)]
EPS = 1e-3

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [(torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype).requires_grad_() for shape in shapes]


def exact(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    """The formula, in whatever dtype the tensors have."""
    centre = inputs - inputs.mean(-1, keepdim=True) if centred else inputs
    output = centre / torch.sqrt(centre.square().mean(-1, keepdim=True) + EPS)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def normed(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool) -> Tensor:
    if not centred:
        assert weight is not None
        return kernels.rms_norm(inputs, weight, EPS)
    return kernels.layer_norm(inputs, inputs.shape[-1:], weight, bias, EPS)


def added(one: Tensor, two: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool) -> tuple[Tensor, Tensor]:
    if not centred:
        assert weight is not None
        return kernels.add_rms_norm(one, two, weight, EPS)
    return kernels.add_layer_norm(one, two, weight, bias, EPS)


def assert_exact(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Each within the rounding of its dtype, by the size of its largest value."""
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        scale = max(1.0, float(other.abs().max()) if other.numel() else 1.0)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2 * TOLERANCES[dtype] * scale)


def parameters(width: int, dtype: torch.dtype, kind: str) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return weight, bias and whether the mean is subtracted, of a kind of norm."""
    weight, bias = draw(dtype, (width,), (width,))
    return None if kind == "bare" else weight, bias if kind == "layer" else None, kind != "rms"


KINDS = ["layer", "unbiased", "bare", "rms"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, bias, centred = parameters(shape[-1], dtype, kind)
    inputs, upstream, _ = draw(dtype, shape, shape, shape)
    leaves = [each for each in (inputs, weight, bias) if each is not None]
    output = normed(inputs, weight, bias, centred)
    found = [output, *torch.autograd.grad(output, leaves, upstream)]
    x, w, b = (None if each is None else each.detach().double().requires_grad_() for each in (inputs, weight, bias))
    wanted = exact(x, w, b, centred)
    gradients = torch.autograd.grad(wanted, [each for each in (x, w, b) if each is not None], upstream.double())
    assert_exact(found, [wanted, *gradients], dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_with_the_residual(kind: str, dtype: torch.dtype, shape: tuple[int, ...], used: str) -> None:
    weight, bias, centred = parameters(shape[-1], dtype, kind)
    one, two, *upstream = draw(dtype, shape, shape, shape, shape)
    output, total = added(one, two, weight, bias, centred)
    assert torch.equal(total, one + two)
    assert torch.equal(output, normed(total, weight, bias, centred)), "as where it is computed again"
    x, w, b = (None if each is None else each.detach().double().requires_grad_() for each in (total, weight, bias))
    wanted = exact(x, w, b, centred)
    pick = {"both": slice(0, 2), "norm": slice(0, 1), "sum": slice(1, 2)}[used]
    leaves = [one, two, *(each for each in (weight, bias) if each is not None and used != "sum")]
    found = torch.autograd.grad((output, total)[pick], leaves, upstream[pick])
    doubles = [x, *(each for each in (w, b) if each is not None and used != "sum")]
    above = [each.double() for each in upstream]
    expected = torch.autograd.grad((wanted, x * 1)[pick], doubles, above[pick])
    assert torch.equal(found[0], found[1])
    assert_exact([output, *found[1:]], [wanted, *expected], dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_in_rows(kind: str) -> None:
    weight, bias, centred = parameters(76, torch.float32, kind)
    wide = torch.randn(4, 7, 5, 90, generator=torch.Generator().manual_seed(1)).transpose(1, 2)[..., 3:79]
    results = []
    for dense in (False, True):
        one, two, *upstream = (each.contiguous() if dense else each for each in wide)
        leaves = [one.requires_grad_() if dense else one.detach().requires_grad_(), two.detach().requires_grad_()]
        pair = added(leaves[0], leaves[1], weight, bias, centred)
        single = normed(leaves[0], weight, bias, centred)
        gradients = torch.autograd.grad((*pair, single), leaves, (*upstream, upstream[1].expand_as(single)))
        results.append([*pair, single, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(kind: str, dtype: torch.dtype) -> None:
    weight, bias, centred = parameters(130, dtype, kind)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one, two, *upstream = draw(dtype, *[(1501, 130)] * 4)
            pair = added(one, two, weight, bias, centred)
            leaves = [each for each in (one, weight, bias) if each is not None]
            results.append([*pair, *torch.autograd.grad(pair, leaves, upstream)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_added_as_autograd_would(kind: str, dtype: torch.dtype) -> None:
    weight, bias, centred = parameters(130, dtype, kind)
    one, two, *upstream = draw(dtype, *[(9, 130)] * 4)
    pair = added(one, two, weight, bias, centred)
    (found,) = torch.autograd.grad(pair, one, upstream)
    apart = (one + two).detach().requires_grad_()
    (alone,) = torch.autograd.grad(normed(apart, weight, bias, centred), apart, upstream[0])
    assert torch.equal(found, alone + upstream[1])


def test_many_rows_are_summed_in_parts_of_which_there_are_few() -> None:
    inputs, weight, upstream = draw(torch.float32, (9001, 3), (3,), (9001, 3))
    (found,) = torch.autograd.grad(kernels.rms_norm(inputs, weight, EPS), weight, upstream)
    x, w = (each.detach().double().requires_grad_() for each in (inputs, weight))
    (wanted,) = torch.autograd.grad(exact(x, w, None, False), w, upstream.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)  # of sums of about 1e3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_in_fp32(dtype: torch.dtype) -> None:
    inputs, upstream = draw(dtype, (40, 33), (40, 33))
    weight, bias = draw(torch.float32, (33,), (33,))
    x, w, b = (each.detach().double().requires_grad_() for each in (inputs, weight, bias))
    for found, wanted in (
        (kernels.layer_norm(inputs, (33,), weight, bias, EPS), exact(x, w, b, True)),
        (kernels.rms_norm(inputs, weight, EPS), exact(x, w, None, False)),
    ):
        assert type(found.grad_fn).__name__ == "_NormBackward"
        ours = torch.autograd.grad(found, [inputs, weight], upstream)
        theirs = torch.autograd.grad(wanted, [x, w], upstream.double())
        assert_exact([found, ours[0]], [wanted, theirs[0]], dtype)
        assert_exact([ours[1]], [theirs[1]], torch.float32)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    (inputs,) = draw(torch.float32, (5, 90))
    far = inputs.detach() + 1000
    wanted = exact(far.double(), None, None, True)
    torch.testing.assert_close(normed(far, None, None, True).double(), wanted, rtol=1e-4, atol=1e-4)


def test_over_two_dims_and_no_rows_and_one_feature() -> None:
    inputs, weight, bias, upstream = draw(torch.float32, (2, 3, 4, 5), (4, 5), (4, 5), (2, 3, 4, 5))
    results = [
        [output, *torch.autograd.grad(output, [inputs, weight, bias], upstream)]
        for function in (kernels.layer_norm, formulae.layer_norm_reference)
        for output in [function(inputs, (4, 5), weight, bias, EPS)]
    ]
    torch.testing.assert_close(*results)
    assert type(results[0][0].grad_fn).__name__ == "_NormBackward"
    empty, gains = draw(torch.float32, (0, 8), (8,))
    normed_rows, total = kernels.add_rms_norm(empty, empty, gains, EPS)
    assert normed_rows.shape == total.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(normed_rows.sum(), gains)[0], torch.zeros(8))
    (single,) = draw(torch.float32, (4, 1))
    one = torch.ones(1)
    assert torch.equal(kernels.layer_norm(single, (1,), one, one, EPS), torch.ones(4, 1))
    torch.testing.assert_close(kernels.rms_norm(single, one, EPS), formulae.rms_norm_reference(single, one, EPS))


def test_what_is_no_number_stays_in_its_row() -> None:
    inputs, weight = draw(torch.bfloat16, (9, 40), (40,))
    for value in (float("nan"), float("inf")):
        bad = inputs.detach().clone()
        bad[4, 7] = value
        output, total = kernels.add_layer_norm(bad, bad * 0 + 1, weight, None, EPS)
        assert output[4].isnan().all()
        assert not output[torch.arange(9) != 4].isnan().any()
        assert torch.equal(total.isnan(), (bad + (bad * 0 + 1)).isnan())


def test_sums_round_as_pytorchs_down_to_the_smallest() -> None:
    scales = torch.logspace(-40, 37, 500)
    one, two = (torch.randn(2, 500, generator=torch.Generator().manual_seed(seed)) * scales for seed in (0, 1))
    for dtype in TOLERANCES:
        first, second = (
            each.clamp(-3e4, 3e4).to(dtype) if dtype == torch.float16 else each.to(dtype) for each in (one, two)
        )
        total = kernels.add_layer_norm(first, second, None, None, EPS)[1]
        assert torch.equal(total, first + second), dtype


def test_what_is_kept_may_not_be_changed_in_its_place() -> None:
    inputs, residual, weight = draw(torch.float32, (3, 8), (3, 8), (8,))
    changed = inputs * 1
    output = kernels.rms_norm(changed, weight, EPS)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, total = kernels.add_rms_norm(inputs, residual, weight, EPS)
    total.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, total = kernels.add_rms_norm(inputs, residual, weight, EPS)
    output.add_(1)  # kept by nobody
    output.sum().backward()


def test_gradients_of_inputs_and_residual_that_go_on_are_not_shared() -> None:
    """Both get one tensor; what is added to the gradient of one does not reach the other."""
    one, two, weight = draw(torch.float32, (3, 8), (3, 8), (8,))
    for _ in range(2):  # the second time it is added to what is there
        output, total = kernels.add_rms_norm(one, two, weight, EPS)
        (output.sum() + total.sum() + 3 * one.sum()).backward()
    assert one.grad is not None
    assert two.grad is not None
    torch.testing.assert_close(one.grad, two.grad + 6)


def test_an_output_that_is_made_again() -> None:
    one, two, weight, matrix = draw(torch.float32, (3, 8), (3, 8), (8,), (8, 8))
    results = []
    for again in (False, True):
        normed_rows, total = kernels.add_rms_norm(one, two, weight, EPS)
        if again:
            with made_again(normed_rows, lambda t: kernels.rms_norm(t, weight, EPS), total):
                product = normed_rows @ matrix
            normed_rows.data.zero_()  # whoever still had it would see this
        else:
            product = normed_rows @ matrix
        results.append(torch.autograd.grad(product.sin().sum(), [one, two, weight, matrix]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


Call = Callable[..., Tensor | tuple[Tensor, Tensor]]


def calls(module: object) -> list[Call]:
    """Return all four functions of (one, two, weight)."""
    functions = [getattr(module, name) for name in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")]
    layer, add_layer, rms, add_rms = functions
    return [
        lambda one, two, weight: layer(one, weight.shape, weight, weight, EPS),
        lambda one, two, weight: add_layer(one, two, weight, None, EPS),
        lambda one, two, weight: rms(one, weight, EPS),
        lambda one, two, weight: add_rms(one, two, weight, EPS),
    ]


def test_what_is_compiled_or_of_other_dtypes_or_shapes_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernel", None)
    tensors = draw(torch.float32, (3, 8), (3, 8), (8,))
    doubles = [each.detach().double() for each in tensors]
    for ours, theirs in zip(calls(kernels), calls(formulae), strict=True):
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*tensors), theirs(*tensors))
        torch.testing.assert_close(ours(*doubles), theirs(*doubles), rtol=0, atol=0)
    one, two, weight = tensors
    heads = torch.randn(4, 8)
    torch.testing.assert_close(kernels.rms_norm(one[:, None], heads, EPS), formulae.rms_norm(one[:, None], heads, EPS))
    broad = kernels.add_rms_norm(one, two[:1], weight, EPS)
    torch.testing.assert_close(broad, formulae.add_rms_norm(one, two[:1], weight, EPS))
    assert torch.equal(
        kernels.layer_norm(one, (8,), None, weight, EPS), formulae.layer_norm(one, (8,), None, weight, EPS)
    )
    with pytest.raises(RuntimeError, match="normalized_shape"):
        kernels.layer_norm(one, (7,), weight[:7], None, EPS)
