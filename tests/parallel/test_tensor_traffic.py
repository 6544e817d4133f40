"""The bytes of every collective of a step under tensor and sequence parallelism, against their closed forms.

With b rows of s tokens in a micro-batch, M micro-batches, L layers, hidden size h and e bytes of an element, one
activation is A = b s h e bytes.

    tensor parallel       4 L + 2 all-reduces of A for each micro-batch: two leave a layer forward and two backward,
                          one after the embedding, one before the head. 2 L + 2 with the parallel residual.
    sequence parallel     each all-reduce becomes an all-gather and a reduce-scatter of A.
    recomputed layers     what the backward pass needs again: all but the last sum of each layer.
    loss                  the maximum of each token's logits, and their sum with the label's logit: 3 b s fp32 numbers.
    gradients             the partial ones, once a step in fp32: norms inside the region (parallel residual), or under
                          sequence parallelism those outside of it and learned positions.
    norm                  one number, in fp64; the wish to stop, beside the sum of losses: two.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron.engine.build import build_engine
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.parallel.matrix import SMALL, VOCAB, make_batches, make_config, make_mesh, micro_batches
from tests.parallel.traffic import Traffic, summed
from tests.ranks import run_ranks

LAYERS, HIDDEN, LENGTH, ROWS = SMALL["num_layers"], SMALL["hidden_size"], SMALL["seq_length"], SMALL["train_batch_size"]
TP: dict[str, Any] = {"model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}
GPT_J = {"gpt_j_residual": True}
NORM = 2 * HIDDEN  # numbers in a layernorm


def step_traffic(flat: dict[str, Any], world_size: int) -> dict[str, int]:
    config = make_config(flat, world_size)
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    batches = micro_batches(config, make_batches(config)[0], mesh)
    with Traffic() as traffic:
        engine.train_step(batches, 0)
    return summed(traffic)


def activations(count: int, element: int = 4) -> int:
    """Bytes of `count` activations over all micro-batches, which together hold the whole batch."""
    return count * ROWS * LENGTH * HIDDEN * element


def others(partial: int) -> int:
    """Bytes of the loss, of `partial` numbers of partial gradients, of the norm, and of what ranks wish and decided."""
    return 3 * ROWS * LENGTH * 4 + partial * 4 + 8 + 7 * 8


GATHERED = 4 * LAYERS + 2  # also the number of all-reduces without sequence parallelism
PARALLEL = 2 * LAYERS + 2

CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "tensor": (TP, {"all_reduce": activations(GATHERED) + others(0)}),
    "accumulation changes nothing": (
        {**TP, "gradient_accumulation_steps": 4},
        {"all_reduce": activations(GATHERED) + others(0)},
    ),
    "tied": ({**TP, "no_weight_tying": False}, {"all_reduce": activations(GATHERED) + others(0)}),
    "parallel residual": (
        {**TP, **GPT_J},
        {"all_reduce": activations(PARALLEL) + others(2 * LAYERS * NORM)},
    ),
    "parallel residual with one norm": (
        {**TP, **GPT_J, "gpt_j_tied": True},
        {"all_reduce": activations(PARALLEL) + others(LAYERS * NORM)},
    ),
    "bf16": ({**TP, "precision": "bf16"}, {"all_reduce": activations(GATHERED, 2) + others(0)}),
    "bf16 summed in fp32": (
        {**TP, "precision": "bf16", "fp32_allreduce": True},
        {"all_reduce": activations(GATHERED) + others(0)},
    ),
    "recomputed": (
        {**TP, "checkpoint_activations": True},
        {"all_reduce": activations(GATHERED + LAYERS) + others(0)},
    ),
    "sequence": (
        SP,
        {
            "all_gather": activations(GATHERED),
            "reduce_scatter": activations(GATHERED),
            "all_reduce": others((2 * LAYERS + 1) * NORM),
        },
    ),
    "sequence, learned positions": (
        {**SP, "pos_emb": "learned"},
        {
            "all_gather": activations(GATHERED),
            "reduce_scatter": activations(GATHERED),
            "all_reduce": others((2 * LAYERS + 1) * NORM + LENGTH * HIDDEN),
        },
    ),
    "sequence, parallel residual": (
        {**SP, **GPT_J},
        {
            "all_gather": activations(PARALLEL),
            "reduce_scatter": activations(PARALLEL),
            "all_reduce": others((2 * LAYERS + 1) * NORM),
        },
    ),
    "sequence, bf16 summed in fp32": (
        {**SP, "precision": "bf16", "fp32_allreduce": True},
        {
            "all_gather": activations(GATHERED, 2),
            "reduce_scatter": activations(GATHERED, 4),
            "all_reduce": others((2 * LAYERS + 1) * NORM),
        },
    ),
    "sequence, recomputed": (
        {**SP, "checkpoint_activations": True},
        {
            "all_gather": activations(GATHERED + 2 * LAYERS),
            "reduce_scatter": activations(GATHERED + LAYERS),
            "all_reduce": others((2 * LAYERS + 1) * NORM),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_a_step(case: str) -> None:
    flat, expected = CASES[case]
    assert run_ranks(2, step_traffic, flat, 2) == [expected, expected]


def test_one_process_sends_nothing() -> None:
    assert run_ranks(1, step_traffic, {}, 1) == [{}]
