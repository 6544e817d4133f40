"""The chunked loss equals the formula on all logits, in value and gradient, whatever the chunk size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops import cross_entropy
from megatron.ops.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_sum,
)

TOKENS, HIDDEN, VOCABULARY = 23, 5, 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=[7, 12, 1000], ids=lambda tokens: f"chunks of {tokens}")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so many tokens, handled in blocks of 3 rows."""
    monkeypatch.setattr(cross_entropy, "_chunk", lambda weight: request.param)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 3 * 4 * VOCABULARY)


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    weights = torch.rand(1, TOKENS, generator=generator) * (torch.arange(TOKENS) % 3 > 0)
    return hidden, weight, labels, weights


def exact_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the losses and the gradients of sum(losses * weights) in fp64."""
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    losses = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*leaves).flatten(0, 1), labels.flatten(), reduction="none"
    ).view(labels.shape)
    (losses * weights).sum().backward()
    return losses.detach(), [leaf.grad for leaf in leaves]


def check_gradients(leaves: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for leaf, exact in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - exact).norm() / exact.norm()
        assert error < TOLERANCES[dtype], error


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sum(dtype: torch.dtype) -> None:
    hidden, weight, labels, weights = draw(dtype)
    losses, gradients = exact_gradients(hidden, weight, labels, weights)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    total = linear_cross_entropy_sum(*leaves, labels, weights)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), (losses * weights).sum(), rtol=TOLERANCES[dtype], atol=0)
    (total * 0.25).backward()
    check_gradients(leaves, [gradient * 0.25 for gradient in gradients], dtype)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_tokens(dtype: torch.dtype) -> None:
    hidden, weight, labels, weights = draw(dtype)
    exact, gradients = exact_gradients(hidden, weight, labels, weights)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy(*leaves, labels)
    torch.testing.assert_close(losses, linear_cross_entropy_reference(*leaves, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.double(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    (losses * weights).sum().backward()
    check_gradients(leaves, gradients, dtype)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_frozen_costs_no_product(dtype: torch.dtype, frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = draw(dtype)
    _, gradients = exact_gradients(hidden, weight, labels, weights)
    leaves = [tensor.requires_grad_(index != frozen) for index, tensor in enumerate((hidden, weight))]
    into, of_weights = cross_entropy.product_into, ("accumulate_product", "_product")
    if frozen:
        for name in of_weights:
            monkeypatch.setattr(cross_entropy, name, lambda *args: pytest.fail("nobody needs W's gradient"))
    else:  # all that is left of these is logits
        monkeypatch.setattr(
            cross_entropy, "product_into", lambda out, *pair: into(out, *pair) if out.shape[1] != HIDDEN else 1 / 0
        )
    linear_cross_entropy_sum(*leaves, labels, weights).backward()
    (linear_cross_entropy(*leaves, labels) * weights).sum().backward()
    assert leaves[frozen].grad is None
    check_gradients([leaves[1 - frozen]], [2 * gradients[1 - frozen]], dtype)


@pytest.mark.usefixtures("chunks")
def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels, weights = draw(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    total = linear_cross_entropy_sum(*leaves, labels, weights)
    total.backward(retain_graph=True)
    before = [leaf.grad.clone() for leaf in leaves]
    with pytest.raises(RuntimeError, match="compute it again"):
        total.backward()
    assert all(torch.equal(leaf.grad, one) for leaf, one in zip(leaves, before, strict=True))


@pytest.mark.parametrize("function", [linear_cross_entropy_sum, lambda *args: linear_cross_entropy(*args[:3]).sum()])
def test_gradients_of_gradients_are_refused(function: Callable[..., Tensor]) -> None:
    hidden, weight, labels, weights = draw(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    first = torch.autograd.grad(function(*leaves, labels, weights).square(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_a_target_of_probability_zero_has_a_finite_loss() -> None:
    hidden, weight = torch.tensor([[[200.0]]]), torch.tensor([[1.0], [-1.0]])
    assert float(linear_cross_entropy(hidden, weight, torch.tensor([[1]]))) == pytest.approx(400)
    assert float(linear_cross_entropy(hidden, weight, torch.tensor([[0]]))) == pytest.approx(0)


def test_small_fp16_gradients_do_not_vanish() -> None:
    """Half of a vocabulary of 60000 has probabilities below the least normal fp16 number."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, 4, generator=generator).half().requires_grad_()
    weight = (0.5 * torch.randn(60000, 4, generator=generator)).half().requires_grad_()
    labels = torch.tensor([[1, 2]])
    _, gradients = exact_gradients(hidden.detach(), weight.detach(), labels, torch.ones(1, 2))
    (4096 * linear_cross_entropy_sum(hidden, weight, labels, torch.ones(1, 2))).backward()
    error = (weight.grad[3:].double() / 4096 - gradients[1][3:]).norm() / gradients[1][3:].norm()
    assert error < 1e-2


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, labels, weights = draw(torch.float32)
    weight.requires_grad_()
    with torch.no_grad():
        total = linear_cross_entropy_sum(hidden, weight, labels, weights)
    assert total.grad_fn is None
    only_weight = linear_cross_entropy_sum(hidden, weight, labels, weights)
    only_weight.backward()
    torch.testing.assert_close(only_weight, total)


def test_memory_is_bounded_by_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward pass has more elements than a chunk's logits or the weights."""
    monkeypatch.setattr(cross_entropy, "_chunk", lambda weight: 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight = torch.randn(512, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    with Watch():
        linear_cross_entropy_sum(hidden, weight, torch.zeros(512, dtype=torch.long), torch.ones(512)).backward()
    assert largest <= max(hidden.numel(), 8 * VOCABULARY)


def test_fp16_gradients_of_a_frequent_label_do_not_overflow() -> None:
    """2,000 tokens of one label: the sum of their gradients, before it is divided by their number, is beyond fp16."""
    generator = torch.Generator().manual_seed(0)
    hidden = (3 + torch.randn(1, 2000, HIDDEN, generator=generator)).half().requires_grad_()
    weight = (0.1 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).half().requires_grad_()
    labels, weights = torch.full((1, 2000), 5), torch.ones(1, 2000)
    _, gradients = exact_gradients(hidden.detach(), weight.detach(), labels, weights)
    (linear_cross_entropy_sum(hidden, weight, labels, weights) * (1 / 2000)).backward()
    check_gradients([hidden, weight], [gradient / 2000 for gradient in gradients], torch.float16)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(8, 8), (8 + 2 * HIDDEN, 8 + 2 * HIDDEN), (9 + 2 * HIDDEN, 7), (9, 9)]
)
def test_bf16_takes_one_chunk_where_that_is_no_more_memory(
    tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits beyond a chunk's are 2 bytes each, and the fp32 sum that they replace has 4 for each weight."""
    monkeypatch.setattr(cross_entropy, "_chunk", lambda weight: 8)
    hidden, weight = torch.empty(tokens, HIDDEN), torch.empty(VOCABULARY, HIDDEN)
    assert cross_entropy._size(hidden.bfloat16(), weight.bfloat16()) == expected
    assert cross_entropy._size(hidden, weight) <= 8
