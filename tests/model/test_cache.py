"""Decoding with a cache equals the full context: the same logits and next token, for every kind of position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.model.cache import KVCache
from megatron.model.sequential import SequentialModel
from tests.model.models import random_tokens, small_config, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "rotary_all": {"rotary_pct": 1.0, "gpt_j_residual": True},
    "learned": {"pos_emb": "learned"},
    "opt": {"pos_emb": "learned", "opt_pos_emb_offset": 2},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "alibi": {"pos_emb": "alibi"},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 16},
    "none": {"pos_emb": "none"},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1, "pos_emb": "alibi"},
    "window": {"sliding_window_width": 4},
    "local": {"sliding_window_width": 3, "attention_config": [[["local", "global"], "all"]], "pos_emb": "alibi"},
    "qk_norm": {"use_qk_layernorm": True, "num_kv_heads": 2},
    "scaling": {"apply_query_key_layer_scaling": True},
}


def decode(
    model: SequentialModel, settings: dict[str, Any], tokens: Tensor, parts: list[int], padding: Tensor
) -> Tensor:
    """Return the logits of tokens [b, s], fed to a cache in parts of these lengths."""
    cache = KVCache(small_config(**settings).model, len(tokens), tokens.shape[1], "cpu", torch.float32)
    cache.set_padding(padding)
    with torch.no_grad():
        logits = [model(part, cache=cache) for part in tokens.split(parts, dim=1)]
    assert cache.length == tokens.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_those_of_the_full_context(name: str) -> None:
    settings = VARIANTS[name]
    model = small_model(**settings)
    tokens = random_tokens(2, 14)
    expected = model(tokens)
    for parts in ([1] * 14, [9, 1, 1, 3]):
        logits = decode(model, settings, tokens, parts, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_different_lengths_equal_each_row_alone(name: str) -> None:
    settings = VARIANTS[name]
    model = small_model(**settings)
    tokens, padding = random_tokens(3, 12), torch.tensor([0, 5, 2])
    logits = decode(model, settings, tokens, [8, 1, 3], padding)
    for row, pad in enumerate(padding.tolist()):
        alone = model(tokens[row : row + 1, pad:])[0]
        torch.testing.assert_close(logits[row, pad:], alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits[row, pad:].argmax(-1), alone.argmax(-1))
    assert bool(logits.isfinite().all())


def test_a_cache_serves_again_after_a_reset() -> None:
    model, tokens = small_model(), random_tokens(1, 6)
    cache = KVCache(small_config().model, 1, 8, "cpu", torch.float32)
    cache.set_padding(torch.tensor([2]))
    with torch.no_grad():
        model(random_tokens(1, 7, seed=5), cache=cache)
        cache.reset()
        torch.testing.assert_close(model(tokens, cache=cache), model(tokens), rtol=1e-4, atol=1e-5)


def test_a_full_cache_says_so() -> None:
    model = small_model()
    cache = KVCache(small_config().model, 1, 4, "cpu", torch.float32)
    with pytest.raises(ValueError, match="room for 4 tokens, and 5 are asked of it"):
        model(random_tokens(1, 5), cache=cache)


def test_keys_of_grouped_heads_are_stored_once_per_group() -> None:
    shared = KVCache(small_config(num_kv_heads=1).model, 1, 4, "cpu", torch.bfloat16)
    full = KVCache(small_config().model, 1, 4, "cpu", torch.bfloat16)
    assert full.num_bytes == 4 * shared.num_bytes == 2 * 2 * (4 * 4 * 8) * 2


def test_tables_made_for_generation_serve_training() -> None:
    for settings in ({}, {"pos_emb": "alibi"}, {"sliding_window_width": 3}):
        model, tokens = small_model(**settings), random_tokens()
        with torch.inference_mode():
            model(tokens)
        model(tokens, labels=tokens).sum().backward()
