"""Selective recomputation under every engine equals one process without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.model import offload
from tests.parallel.matrix import assert_equal, run_layout, run_reference
from tests.parallel.test_pipeline import first_gradients
from tests.ranks import run_ranks

PARTS = {"checkpoint_activations": True, "checkpoint_operations": ["norm", "attention", "activation"]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ours": (2, {}),
    "ZeRO 1": (2, {"stage": 1}),
    "ZeRO 3": (2, {"stage": 3}),
    "tensor": (2, {"model_parallel_size": 2}),
    "sequence, ZeRO 3": (4, {"model_parallel_size": 2, "sequence_parallel": True, "stage": 3}),
    "ring": (2, {"context_parallel_size": 2}),
    "all to all": (2, {"context_parallel_size": 2, "context_parallel_method": "all_to_all", "stage": 1}),
    "pipeline of tensor": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2, "stage": 1}),
}
MODEL = {"pos_emb": "rotary", "no_weight_tying": False, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("first", [None, 1])
def test_selective_recomputation_equals_one_process(name, first):
    world_size, layout = LAYOUTS[name]
    trace = run_layout({**MODEL, **layout, **PARTS, "checkpoint_first_layers": first}, world_size)
    assert_equal(trace, run_reference(MODEL), 1e-5)


@pytest.mark.parametrize("name", ["ours", "ZeRO 3", "sequence, ZeRO 3", "pipeline of tensor"])
def test_dropout_masks_are_drawn_again(name):
    world_size, layout = LAYOUTS[name]
    flat = {**MODEL, **layout, "hidden_dropout": 0.2, "attention_dropout": 0.3}
    kept = run_ranks(world_size, first_gradients, flat, world_size)
    recomputed = run_ranks(world_size, first_gradients, {**flat, **PARTS}, world_size)
    for (_, gradients), (_, others) in zip(kept, recomputed, strict=True):
        assert all(torch.equal(gradient, others[parameter]) for parameter, gradient in gradients.items())


@pytest.mark.parametrize("name", ["ours", "ZeRO 3", "sequence, ZeRO 3", "all to all", "pipeline of tensor"])
def test_activations_that_travel_change_no_bit(name, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 300)
    world_size, layout = LAYOUTS[name]
    flat = {**MODEL, **layout, "hidden_dropout": 0.2, "attention_dropout": 0.3, **PARTS}
    kept = run_ranks(world_size, first_gradients, flat, world_size)
    travelled = run_ranks(world_size, first_gradients, {**flat, "offload_activations": True}, world_size)
    for (_, gradients), (_, others) in zip(kept, travelled, strict=True):
        assert all(torch.equal(gradient, others[parameter]) for parameter, gradient in gradients.items())
