"""Compiled blocks train as eager ones do, under every engine, with recomputation and with all sorts of blocks.

What torch.compile traces and differentiates is tested with the backend "aot_eager", which generates no code; one test
generates it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.ranks import preload, run_ranks

preload()
from megatron.engine import build  # noqa: E402
from megatron.model.compiled import compile_blocks  # noqa: E402
from tests.parallel import matrix  # noqa: E402

RECOMPUTED: dict[str, Any] = {"checkpoint_activations": True}
OPERATIONS: dict[str, Any] = {**RECOMPUTED, "checkpoint_operations": ["attention", "activation"]}


def train(compiled: bool, flat: dict[str, Any], world_size: int, backend: str = "aot_eager") -> tuple[Any, int, int]:
    """Return the trace of a run with two layers, the graphs that were compiled, and the breaks between graphs."""
    build.compile_blocks = partial(compile_blocks, backend=backend)  # type: ignore[assignment]
    config = matrix.make_config({"num_layers": 2, "compile": compiled, **flat}, world_size)
    trace = matrix.train_layout(config, matrix.make_batches(config, steps=2))
    counters: Any = torch._dynamo.utils.counters
    return trace, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def compare(flat: dict[str, Any], world_size: int = 1, most_graphs: int = 4, **keys: Any) -> None:
    """Train both ways; compare losses, norms, every gradient and the weights."""
    (expected, *_), *_ = run_ranks(world_size, train, False, flat, world_size)
    for trace, graphs, breaks in run_ranks(world_size, partial(train, **keys), True, flat, world_size):
        matrix.assert_equal(trace, expected, 1e-5)
        assert 1 <= graphs <= most_graphs, "each layer has a graph of its own"
        assert not breaks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_engine(stage: int) -> None:
    compare({"stage": stage, **(RECOMPUTED if stage == 3 else {})}, most_graphs=2)


@pytest.mark.parametrize(
    "flat",
    [
        {"gpt_j_residual": True, "gpt_j_tied": True, "activation": "swiglu", "norm": "rmsnorm", **RECOMPUTED},
        {"pos_emb": "alibi", "num_kv_heads": 2, "use_qk_layernorm": True, "hidden_dropout": 0.0},
        {"pos_emb": "rpe", "sliding_window_width": 4, "attention_config": [[["local", "global"], 1]]},
        {"pos_emb": "learned", "apply_query_key_layer_scaling": True, "precision": "fp32", **OPERATIONS},
    ],
    ids=["parallel", "alibi", "rpe", "learned"],
)
def test_every_sort_of_block(flat: dict[str, Any]) -> None:
    compare(flat)


def test_tensor_parallel_blocks() -> None:
    compare({"model_parallel_size": 2, "sequence_parallel": True}, world_size=2)


def test_generated_code() -> None:
    compare({"num_layers": 2}, backend="inductor")


def test_dropout_repeats_bit_by_bit_and_is_not_off() -> None:
    flat = {"hidden_dropout": 0.1, "attention_dropout": 0.1, **RECOMPUTED}
    first, second = (run_ranks(1, train, True, flat, 1)[0][0] for _ in range(2))
    assert first.losses == second.losses
    assert first.losses != run_ranks(1, train, True, {}, 1)[0][0].losses
