"""What a block leaves to the next norm to add changes no digit, and is one pass over memory less for each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.model.block import Block
from megatron.model.norm import LayerNorm, RMSNorm
from megatron.model.sequential import SequentialModel
from megatron.model.stream import Stream
from tests.model.models import random_tokens, small_model

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu"},
    "scalenorm": {"norm": "scalenorm"},
    "neox": {"gpt_j_residual": True},
    "tied": {"gpt_j_residual": True, "gpt_j_tied": True},
    "dropout": {"hidden_dropout": 0.2},
}


def losses_and_gradients(model: SequentialModel, defers: bool | None = None) -> list[Tensor]:
    for block in model.modules():
        if isinstance(block, Block) and defers is not None:
            block.defers = defers
    tokens = random_tokens()
    torch.manual_seed(5)
    losses = model(tokens, labels=tokens)
    return [losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_same_to_the_last_bit(name: str, training: bool) -> None:
    model = small_model(**MODELS[name]).train(training)
    for one, other in zip(losses_and_gradients(model, True), losses_and_gradients(model, False), strict=True):
        assert torch.equal(one, other)


def additions(**settings: Any) -> int:
    """Return how many norms add as they read."""
    model, count = small_model(num_layers=4, **settings), 0
    for norm in model.modules():
        if isinstance(norm, LayerNorm | RMSNorm):

            def counted(*arguments: Any, add_norm: Any = norm.add_norm) -> Any:
                nonlocal count
                count += 1
                return add_norm(*arguments)

            norm.add_norm = counted
    with torch.no_grad():
        model(random_tokens())
    return count


def test_all_but_the_first_norm_add() -> None:
    assert additions() == 8
    assert additions(norm="rmsnorm") == 8
    assert additions(gpt_j_residual=True) == 4


def test_what_is_kept_for_recomputation_is_one_tensor() -> None:
    assert additions(checkpoint_activations=True) == 4
    assert additions(checkpoint_activations=True, checkpoint_first_layers=2) == 6
    assert additions(checkpoint_activations=True, checkpoint_operations=["activation"]) == 8


def test_a_stream_made_whole() -> None:
    hidden, branch = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    whole = Stream(hidden, branch=branch).whole()
    assert whole.branch is None
    assert torch.equal(whole.hidden, hidden + branch)
    assert whole.whole() is whole
