"""The bytes of every collective of a step under context parallelism, against their closed forms.

With C ranks of a sequence, b rows of s tokens in all micro-batches of a data rank, L layers, e bytes of an element and
K = b (s/C) k d the elements of a rank's keys, Q those of its queries:

    ring          L (C-1) (2 K e forward + 2 K e and 2 K 4 backward)
    window        in a local layer only the chunks that the other rank sees: here one of two
    all_to_all    L (2 Q + 2 K) e forward, and the same backward, 1/C of which stays where it is
    recomputed    the forward pass of attention once more
    gradients     all of them, once a step in fp32 (stage 0), over the replicas: data and context ranks
    loss          the trained tokens, the sum of losses and the wish to stop, a number each in fp64
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron.engine.build import build_engine
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.parallel.matrix import SMALL, VOCAB, make_batches, make_config, make_mesh, micro_batches
from tests.parallel.traffic import Traffic, summed
from tests.ranks import run_ranks

LAYERS, HEADS, ROWS = SMALL["num_layers"], SMALL["num_attention_heads"], SMALL["train_batch_size"]
LENGTH, HEAD = SMALL["seq_length"], SMALL["hidden_size"] // SMALL["num_attention_heads"]


def step_traffic(flat: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Return the bytes of a step by collective, and the number of parameters."""
    config = make_config(flat, dist.get_world_size())
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    batches = micro_batches(config, make_batches(config)[0], mesh)
    with Traffic() as traffic:
        engine.train_step(batches, 0)
    return summed(traffic), sum(parameter.numel() for parameter in engine.model.parameters())


def ring(size: int, data: int = 1, heads: int = HEADS, element: int = 4, forwards: int = 1) -> int:
    keys = ROWS // data * (LENGTH // size) * heads * HEAD
    return LAYERS * (size - 1) * 2 * keys * ((forwards + 1) * element + 4)


def all_to_all(size: int, heads: int = HEADS, passes: int = 2) -> int:
    return LAYERS * ROWS * (LENGTH // size) * HEAD * (2 * HEADS + 2 * heads) * 4 * passes


WINDOW = {"attention_config": [[["local", "global"], "all"]], "sliding_window_width": 3}
HEADS_KEY = {"context_parallel_method": "all_to_all"}
CASES: dict[str, tuple[int, int, dict[str, Any], int]] = {
    # context size, data size, keys, bytes of the exchanges
    "ring": (2, 1, {}, ring(2)),
    "ring of three": (3, 1, {}, ring(3)),
    "ring beside data": (2, 2, {}, ring(2, data=2)),
    "accumulation changes nothing": (2, 1, {"gradient_accumulation_steps": 4}, ring(2)),
    "few key-value heads": (2, 1, {"num_kv_heads": 1}, ring(2, heads=1)),
    "bf16": (2, 1, {"precision": "bf16"}, ring(2, element=2)),
    "recomputed": (2, 1, {"checkpoint_activations": True}, ring(2, forwards=2)),
    "a local layer and a global one": (2, 1, WINDOW, ring(2) * 3 // 4),
    "all to all": (2, 1, HEADS_KEY, all_to_all(2)),
    "all to all, few key-value heads": (2, 1, {**HEADS_KEY, "num_kv_heads": 2}, all_to_all(2, heads=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_a_step(case: str) -> None:
    size, data, keys, exchanged = CASES[case]
    for found, parameters in run_ranks(size * data, step_traffic, {"context_parallel_size": size, **keys}):
        assert found == {"all_to_all": exchanged, "all_reduce": parameters * 4 + 8 * 8}  # numbers
