"""The causal softmax and its gradient are those of the formula in fp64, in windows and where queries see nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.cpu import library, softmax
from megatron.ops.softmax import masked_softmax_reference

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


def draw(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scores [2, 3, q, k], which are not contiguous, and an upstream gradient."""
    generator = torch.Generator().manual_seed(queries)
    scores = torch.randn(2, queries, 3, keys, generator=generator).mul_(4).to(dtype).transpose(1, 2)
    return scores.requires_grad_(), torch.randn(2, 3, queries, keys, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(9, 9, None), (33, 70, 7), (5, 2, None), (6, 40, 100), (64, 64, 1), (1, 17, None)]
)
def test_probabilities_and_gradients_are_the_formulas(dtype, queries, keys, window) -> None:
    scores, upstream = draw(queries, keys, dtype)
    exact = scores.detach().double().requires_grad_()
    found, wanted = (
        softmax.masked_softmax(scores, 0.3, True, window),
        masked_softmax_reference(exact, 0.3, True, window),
    )
    assert type(found.grad_fn).__name__ == "_SeenSoftmaxBackward"
    assert found.dtype == dtype
    gradient, expected = (
        torch.autograd.grad(y, x, upstream.to(y.dtype))[0] for y, x in ((found, scores), (wanted, exact))
    )
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance / 8)
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=4 * tolerance)
    assert torch.equal(found == 0, wanted == 0) or dtype == torch.float16  # which has smaller numbers than it can hold


def test_masks_and_what_is_not_causal_are_left_to_pytorch() -> None:
    scores, _ = draw(6, 6, torch.float32)
    mask = torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    for causal, given in ((True, mask), (False, mask), (False, None)):
        found = softmax.masked_softmax(scores, 0.3, causal, None, given)
        torch.testing.assert_close(found, masked_softmax_reference(scores, 0.3, causal, None, given))
    with pytest.raises(AssertionError, match="a window is one of causal attention"):
        softmax.masked_softmax(scores, 1.0, False, 3)


def test_the_number_of_threads_changes_no_bit() -> None:
    scores, _ = draw(200, 200, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = softmax.masked_softmax(scores, 0.2, True)
        torch.set_num_threads(3)
        assert torch.equal(softmax.masked_softmax(scores, 0.2, True), alone)
    finally:
        torch.set_num_threads(threads)
