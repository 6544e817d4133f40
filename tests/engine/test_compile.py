"""Compiled blocks train as eager ones do, under every engine, with recomputation and with all sorts of blocks.

What torch.compile traces and differentiates is tested with the backend "aot_eager", which generates no code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.ranks import preload, run_ranks

preload()
from megatron.engine import build  # noqa: E402
from megatron.model.build import build_model  # noqa: E402
from megatron.model.compiled import blocks, compile_blocks  # noqa: E402
from megatron.objectives.build import build_objective  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from tests.parallel import matrix  # noqa: E402

RECOMPUTED: dict[str, Any] = {"checkpoint_activations": True}
LETS_GO: dict[str, Any] = {
    "engine": "deepspeed",
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
    },
}  # fmt: skip
"""ZeRO 3 that holds no weight for one moment longer than it must."""

OPERATIONS: dict[str, Any] = {**RECOMPUTED, "checkpoint_operations": ["attention", "activation"]}


def train(compiled: bool, flat: dict[str, Any], world_size: int, backend: str = "aot_eager") -> tuple[Any, int, int]:
    """Return the trace of a run with two layers, the graphs that were compiled, and the breaks between graphs."""
    build.compile_blocks = partial(compile_blocks, backend=backend)  # type: ignore[assignment]
    counters: Any = torch._dynamo.utils.counters
    counters.clear()  # of what the process compiled that this one was forked from
    config = matrix.make_config({"num_layers": 2, "compile": compiled, **flat}, world_size)
    trace = matrix.train_layout(config, matrix.make_batches(config, steps=2))
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
    compare({"stage": stage, "num_layers": 3})  # a graph for the first layer, one for the others; and for evaluation


@pytest.mark.parametrize(
    "flat",
    [
        {"gpt_j_residual": True, "gpt_j_tied": True, "activation": "swiglu", "norm": "rmsnorm", **RECOMPUTED},
        {"pos_emb": "alibi", "num_kv_heads": 2, "use_qk_layernorm": True, **OPERATIONS},
        {"pos_emb": "rpe", "sliding_window_width": 4, "attention_config": [[["local", "global"], 1]]},
    ],
    ids=["parallel", "alibi", "rpe"],
)
def test_every_sort_of_block(flat: dict[str, Any]) -> None:
    compare(flat)


@pytest.mark.parametrize(
    "flat",
    [
        {"num_layers": 4, "checkpoint_num_layers": 2, **RECOMPUTED},
        {
            "gpt_j_residual": True,
            "gpt_j_tied": True,
            "norm": "rmsnorm",
            "train_micro_batch_size_per_gpu": 1,
            **OPERATIONS,
        },
    ],
    ids=["recomputed", "accumulated"],
)
def test_zero_3_whose_weights_go_and_come_again(flat: dict[str, Any]) -> None:
    compare({**LETS_GO, **flat}, world_size=2)


def weights_that_stay(somebody_keeps_views: bool) -> tuple[int, int, int]:
    """Return the blocks whose weights were in memory together in a forward pass, those whose weights were between the
    passes, and the weights after the step, of a model of three blocks under ZeRO 3."""
    build.compile_blocks = partial(compile_blocks, backend="aot_eager")  # type: ignore[assignment]
    config = matrix.make_config({**LETS_GO, "num_layers": 3, "compile": True}, 2)
    mesh = matrix.make_mesh(config)
    engine: Any = build.build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective())
    gathered: list[tuple[int, StorageWeakRef]] = []
    together, between, views = [], [], []

    def living() -> int:
        return len({number for number, storage in gathered if not storage.expired()})

    def note(number: int, block: torch.nn.Module, *_: Any) -> None:
        found = [p for p in block.parameters() if p.ndim == 2]
        assert all(p.numel() for p in found)
        views.extend(p.t() for p in found if somebody_keeps_views)
        gathered.extend((number, StorageWeakRef(p.untyped_storage())) for p in found)
        together.append(living())

    for number, block in enumerate(blocks(engine.model)):
        block.register_forward_pre_hook(partial(note, number))
    backward = engine._backward

    def counted(*arguments: Any) -> None:
        between.append(living())
        backward(*arguments)

    engine._backward = counted
    engine.train_step(matrix.micro_batches(config, matrix.make_batches(config, 1)[0], mesh), 0)
    assert len(gathered) == 3 * 4
    return max(together), max(between), sum(p.numel() for p in engine.model.parameters())


def test_zero_3_holds_no_weight_between_the_passes() -> None:
    for found in run_ranks(2, lambda: [weights_that_stay(keeps) for keeps in (False, True)]):
        assert found == [(1, 0, 0), (3, 3, 0)]


def test_tensor_parallel_blocks() -> None:
    compare({"model_parallel_size": 2, "sequence_parallel": True}, world_size=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; C++ of a CPU takes a minute to compile")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generated_code(precision: str) -> None:
    traces = []
    for compiled in (False, True):
        config = matrix.make_config({"precision": precision, "compile": compiled}, 1)
        mesh = Mesh.single(torch.device("cuda"))
        engine = build.build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective())
        batches = matrix.make_batches(config)
        steps = [matrix.micro_batches(config, batch, mesh) for batch in batches]
        traces.append([engine.train_step(step, iteration) for iteration, step in enumerate(steps)])
    tolerance = {"fp32": 1e-4, "bf16": 2e-2}[precision]
    for one, other in zip(*traces, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)


def test_dropout_repeats_bit_by_bit_and_is_not_off() -> None:
    flat = {"hidden_dropout": 0.1, "attention_dropout": 0.1, **RECOMPUTED}

    def twice() -> list[list[float]]:
        return [train(True, {**flat, "seed": seed}, 1)[0].losses for seed in (5, 5)]

    first, second = run_ranks(1, twice)[0]
    assert first == second
    eager, *_ = run_ranks(1, train, False, {"seed": 5}, 1)
    assert first != eager[0].losses
