from __future__ import annotations

import torch

from megatron.data.batch import Batch
from megatron.objectives.build import build_objective
from megatron.objectives.language import language_loss
from tests.model.models import random_tokens, small_model


def test_sum_of_the_losses_of_trained_tokens() -> None:
    model, tokens = small_model(), random_tokens()
    mask = (random_tokens(seed=4) % 3 > 0).float()
    batch = Batch(tokens, tokens.roll(-1, 1), mask)
    total, num_tokens = language_loss(model, batch)
    losses = torch.nn.functional.cross_entropy(
        model(tokens).flatten(0, 1).double(), batch.labels.flatten(), reduction="none"
    )
    torch.testing.assert_close(total.double(), (losses * mask.flatten()).sum(), rtol=1e-6, atol=0)
    assert float(num_tokens) == float(mask.sum())
    assert (total.dtype, total.shape) == (torch.float32, ())


def test_a_batch_without_trained_tokens_has_a_zero_gradient() -> None:
    model, tokens = small_model(), random_tokens()
    total, num_tokens = language_loss(model, Batch(tokens, tokens, torch.zeros(tokens.shape)))
    total.backward()
    assert float(total) == float(num_tokens) == 0
    assert all(not bool(parameter.grad.any()) for parameter in model.parameters())


def test_micro_batches_add_up_whatever_their_masks() -> None:
    tokens, mask = random_tokens(4, 12), (random_tokens(4, 12, seed=4) % 4 > 0).float()
    mask[0] = 0

    def gradient(parts: int) -> torch.Tensor:
        model = small_model()
        for piece, piece_mask in zip(tokens.chunk(parts), mask.chunk(parts), strict=True):
            total, _ = language_loss(model, Batch(piece, piece.roll(-1, 1), piece_mask))
            (total / mask.sum()).backward()
        return model.get_parameter("layers.0.mlp.linear1.weight").grad

    torch.testing.assert_close(gradient(4), gradient(1), rtol=1e-4, atol=1e-7)


def test_segments_reach_the_attention() -> None:
    model, tokens = small_model(), random_tokens()
    ones, segments = torch.ones(tokens.shape), torch.arange(24).expand(2, 24) // 6
    apart, _ = language_loss(model, Batch(tokens, tokens, ones, segments))
    together, _ = language_loss(model, Batch(tokens, tokens, ones))
    assert float(apart) != float(together)


def test_the_table_of_objectives() -> None:
    assert build_objective() is language_loss
