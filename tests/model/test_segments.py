"""Documents in one row do not see each other where segments are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.models import random_tokens, small_model


@pytest.mark.parametrize(
    "settings", [{}, {"pos_emb": "alibi"}, {"pos_emb": "rpe"}, {"pos_emb": "none", "sliding_window_width": 3}], ids=str
)
def test_documents_equal_themselves_alone(settings: dict[str, Any]) -> None:
    model = small_model(**settings)
    tokens = random_tokens(2, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [3] * 9 + [4] * 3])
    logits = model(tokens, segments=segments)
    for row, cut in ((0, 5), (1, 9)):
        for part in (slice(0, cut), slice(cut, 12)):
            alone = model(tokens[row : row + 1, part])[0]
            torch.testing.assert_close(logits[row, part], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, model(tokens), atol=1e-3)
