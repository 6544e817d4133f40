"""The bytes of every collective of a step under ZeRO, alone and beside sequence and pipeline parallelism.

With P parameters on a rank of w bytes each, of which Z are in tensors that stage 3 never shards, A micro-batches and
gradients in fp32:

    ZeRO 1      all-reduce 4 P                all-gather w P
    ZeRO 2      all-reduce 4 P A              all-gather w P
    ZeRO 3      reduce-scatter 4 P A          all-gather w (A (P - Z) + Z): all is still there when the backward begins
    partial     gradients that are partial on the tensor axis: all together once a step, under ZeRO 2 and 3 once a
                micro-batch
    pipeline    A messages of w b s h to each neighbour; the gradient of what stages share, in fp32; the lengths of what
                DeepSpeed packs
    numbers     trained tokens, the loss and the wish to stop, in fp64; the norm and what else DeepSpeed
                asks, 8 bytes each
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron.engine.build import build_engine
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.parallel.matrix import SMALL, VOCAB, make_batches, make_config, make_mesh, micro_batches
from tests.parallel.traffic import Traffic
from tests.ranks import run_ranks

HIDDEN, LAYERS, LENGTH, ROWS = (SMALL[key] for key in ("hidden_size", "num_layers", "seq_length", "train_batch_size"))
SP = {"model_parallel_size": 2, "sequence_parallel": True}


def step_traffic(flat: dict[str, Any]) -> tuple[dict[tuple[str, str], int], int, int, int]:
    """Return bytes by (axis, collective) of the third step, parameters, parameters in small tensors, and how many
    sums there were over the tensor axis."""
    config = make_config(flat, dist.get_world_size())
    mesh = make_mesh(config)
    model = build_model(config, VOCAB, mesh)
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine = build_engine(config, mesh, model, build_objective())
    batches = [micro_batches(config, batch, mesh) for batch in make_batches(config)[:3]]
    for step in range(2):  # in which ranks tell each other shapes and the order of layers
        engine.train_step(batches[step], step)
    with Traffic(mesh) as traffic:
        engine.train_step(batches[2], 2)
    small = sum(size for size in sizes if size <= 50)  # the threshold of make_config
    return dict(traffic.by_axis), sum(sizes), small, traffic.calls["all_reduce"]


_NUMBERS = 8
"""Doubles that ranks sum in a step: its trained tokens, and the loss with what ranks wish and have decided."""


def expected(stage: int, parameters: int, small: int, accumulation: int, weight: int) -> dict[tuple[str, str], int]:
    if stage == 3:
        gathered = weight * (accumulation * (parameters - small) + small)
        numbers = _NUMBERS * 8 + 2 * 8
        return {
            ("data", "reduce_scatter"): 4 * parameters * accumulation,
            ("data", "all_gather"): gathered,
            ("data", "all_reduce"): numbers,
        }
    times = accumulation if stage == 2 else 1
    norm = 0 if (stage, weight) == (1, 2) else 8  # BF16_Optimizer, of stage 1 in bf16, asks nobody
    return {
        ("data", "all_reduce"): 4 * parameters * times + _NUMBERS * 8 + norm,
        ("data", "all_gather"): weight * parameters,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_of_a_step_over_two_replicas(stage: int, accumulation: int, precision: str) -> None:
    flat = {"stage": stage, "gradient_accumulation_steps": accumulation, "precision": precision}
    for found, parameters, small, _ in run_ranks(2, step_traffic, flat):
        assert found == expected(stage, parameters, small, accumulation, {"fp32": 4, "bf16": 2}[precision])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layers", [2, 4])
def test_partial_gradients_are_summed_together(layers: int, stage: int) -> None:
    accumulation, times = 4, {1: 1}.get(stage, 4)
    flat = {**SP, "stage": stage, "gradient_accumulation_steps": accumulation, "num_layers": layers}
    for found, _, _, calls in run_ranks(2, step_traffic, flat):
        activations = (4 * layers + 2) * ROWS * LENGTH * HIDDEN * 4
        loss, partial, norm = 3 * ROWS * LENGTH * 4, (2 * layers + 1) * 2 * HIDDEN * 4, 16 if stage == 3 else 8
        assert found == {
            ("tensor", "all_gather"): activations,
            ("tensor", "reduce_scatter"): activations,
            ("tensor", "all_reduce"): loss + times * partial + norm + (_NUMBERS - 1) * 8,  # wishes, beside the loss
        }
        assert calls == 2 * accumulation + times + 3  # however many parameters there are


@pytest.mark.parametrize(("stages", "accumulation", "tied"), [(2, 2, False), (2, 4, True), (4, 2, True)])
def test_bytes_of_a_pipeline(stages: int, accumulation: int, tied: bool) -> None:
    flat = {"stage": 1, "pipe_parallel_size": stages, "gradient_accumulation_steps": accumulation, "num_layers": 4}
    ranks = run_ranks(stages, step_traffic, {**flat, "no_weight_tying": not tied})
    for stage, (found, *_) in enumerate(ranks):
        neighbours = (stage > 0) + (stage < stages - 1)
        table = VOCAB * HIDDEN * 4 if tied and stage in (0, stages - 1) else 0
        assert found.pop(("pipeline", "send")) == ROWS * LENGTH * HIDDEN * 4 * neighbours
        shared = found.pop(("other", "all_reduce"), 0) if stages > 2 else 0
        numbers = found.pop(("pipeline", "all_reduce")) - (table if stages == 2 else 0)
        assert shared == (table if stages > 2 else 0)
        assert 0 < numbers <= 8 + _NUMBERS * 8
        assert sum(found.values()) <= 8 + _NUMBERS * 8
