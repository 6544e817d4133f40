"""The decoder equals twenty lines of plain formulas, without a shared line of code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.model.sequential import SequentialModel
from tests.model.models import random_tokens, small_model


def norm(model: SequentialModel, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * model.get_parameter(f"{name}.weight") + model.get_parameter(f"{name}.bias")


def linear(model: SequentialModel, name: str, x: Tensor) -> Tensor:
    return x @ model.get_parameter(f"{name}.weight").T + model.get_parameter(f"{name}.bias")


def attend(model: SequentialModel, name: str, x: Tensor, window: int) -> Tensor:
    length = len(x)
    heads = linear(model, f"{name}.query_key_value", x).view(length, 4, 3, 8)
    outputs = torch.zeros(length, 4, 8)
    for head in range(4):
        query, key, value = heads[:, head].unbind(1)
        for i in range(length):
            seen = slice(max(0, i - window), i + 1)
            outputs[i, head] = ((key[seen] @ query[i]) / math.sqrt(8)).softmax(0) @ value[seen]
    return linear(model, f"{name}.dense", outputs.view(length, 32))


def logits(model: SequentialModel, tokens: Tensor, parallel: bool, windows: list[int]) -> Tensor:
    x = model.get_parameter("embedding.word_embeddings.weight")[tokens]
    x = x + model.get_parameter("embedding.position_embeddings.weight")[: len(tokens)]
    for layer, window in enumerate(windows):
        name = f"layers.{layer}"
        attended = attend(model, f"{name}.attention", norm(model, f"{name}.input_layernorm", x), window)
        second = norm(model, f"{name}.post_attention_layernorm", x if parallel else x + attended)
        x = x + attended + linear(model, f"{name}.mlp.linear2", linear(model, f"{name}.mlp.linear1", second).relu())
    return norm(model, "final_norm", x) @ model.get_parameter("head.weight").T


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({}, [99, 99]),
        ({"sliding_window_width": 3}, [3, 3]),
        ({"sliding_window_width": 3, "attention_config": [[["global", "local"], "all"]]}, [99, 3]),
        ({"sliding_window_width": 99, "attention_config": ["local", "flash"]}, [99, 99]),
    ],
)
def test_decoder(parallel: bool, settings: dict[str, object], windows: list[int]) -> None:
    model = small_model(pos_emb="learned", activation="relu", gpt_j_residual=parallel, **settings)
    tokens = random_tokens(2, 11)
    expected = torch.stack([logits(model, row, parallel, windows) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
