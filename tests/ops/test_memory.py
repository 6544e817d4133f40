"""Buffers that are used again: never by two at a time, and never for another shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron.ops import cross_entropy
from megatron.ops.cross_entropy import linear_cross_entropy_sum
from megatron.ops.embedding import embedding
from megatron.ops.memory import accumulate, keep, release_gradient, take, take_gradient

VOCABULARY, HIDDEN = 19, 6


def test_what_was_kept_is_taken_once() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    first = take(parameter, "logits", (4, 5), torch.float32)
    second = take(parameter, "logits", (4, 5), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    keep(parameter, "logits", first)
    assert take(parameter, "logits", (4, 5), torch.float32) is first


@pytest.mark.parametrize("other", [((5, 4), torch.float32), ((4, 5), torch.bfloat16)])
def test_another_shape_or_dtype_is_new(other: tuple[tuple[int, int], torch.dtype]) -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    keep(parameter, "logits", torch.empty(4, 5))
    taken = take(parameter, "logits", *other)
    assert (tuple(taken.shape), taken.dtype) == other


def test_buffers_made_while_evaluating_serve_training() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    with torch.inference_mode():
        assert not take(parameter, "logits", (2,), torch.float32).is_inference()


def test_a_released_gradient_is_the_next_ones_memory() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.ones(3, 2)
    release_gradient(parameter)  # nobody has asked for one yet: it is freed
    assert parameter.grad is None
    taken = take_gradient(parameter)
    parameter.grad = taken
    release_gradient(parameter)
    assert parameter.grad is None
    assert take_gradient(parameter) is taken


def _table(seed: int, dtype: torch.dtype) -> nn.Parameter:
    values = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(values.to(dtype))


def _loss(tokens: Tensor, table: nn.Parameter, head: nn.Parameter) -> Tensor:
    return linear_cross_entropy_sum(embedding(tokens, table), head, tokens.flip(0), torch.ones(tokens.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_steps_that_share_memory_have_the_gradients_of_fresh_ones(
    dtype: torch.dtype, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_chunk", lambda weight: 4)
    table = _table(1, dtype)
    head = table if tied else _table(2, dtype)
    addresses = []
    for step in range(3):
        tokens = torch.randint(0, VOCABULARY, (11,), generator=torch.Generator().manual_seed(step))
        expected = [nn.Parameter(parameter.detach().clone()) for parameter in (table, head)]
        losses = _loss(tokens, expected[0], expected[0] if tied else expected[1])
        losses.backward()
        _loss(tokens, table, head).backward()
        addresses.append(table.grad.data_ptr())
        for parameter, fresh in zip((table, head), [expected[0], expected[0] if tied else expected[1]], strict=True):
            assert torch.equal(parameter.grad, fresh.grad)
        for parameter in {table, head}:
            release_gradient(parameter)
    assert tied or len(set(addresses)) == 1


def test_two_losses_before_their_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pipeline: the second forward pass must not touch what the first has finished."""
    monkeypatch.setattr(cross_entropy, "_chunk", lambda weight: 4)
    table, head = _table(1, torch.bfloat16), _table(2, torch.bfloat16)
    tokens = [torch.randint(0, VOCABULARY, (11,), generator=torch.Generator().manual_seed(step)) for step in range(2)]
    expected = []
    for each in tokens:
        _loss(each, table, head).backward()
        expected.append(head.grad.clone())
        release_gradient(head)
    losses = [_loss(each, table, head) for each in tokens]
    for loss, right in zip(losses, expected, strict=True):
        loss.backward()
        assert torch.equal(head.grad, right)
        release_gradient(head)


def test_embedding_equals_pytorchs() -> None:
    table, theirs = _table(1, torch.float32), _table(1, torch.float32)
    tokens = torch.tensor([[0, 3, 3], [VOCABULARY - 1, 3, 0]])
    weights = torch.randn(2, 3, HIDDEN)
    rows, expected = embedding(tokens, table), torch.nn.functional.embedding(tokens, theirs)
    assert torch.equal(rows, expected)
    (rows * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(table.grad, theirs.grad)
    with torch.no_grad():
        assert torch.equal(embedding(tokens, table), expected)


@pytest.mark.parametrize("part_dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_gradients_takes_parts_of_any_dtype(part_dtype):
    total, parts = torch.full((3, 2**17 + 5), torch.nan), [torch.randn(3, 2**17 + 5).to(part_dtype) for _ in range(3)]
    for number, part in enumerate(parts):
        accumulate(total, part, is_first=number == 0)
    assert torch.equal(total, (parts[0].float() + parts[1].float()) + parts[2].float())
