"""Closed forms of what a step sends, against the bytes that every rank of real engines sends, axis by axis."""

from typing import Any

import pytest
import torch.distributed as dist

from megatron.engine.build import build_engine
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.planning.communication import Traffic, data_traffic, traffic
from megatron.planning.layout import Layout
from megatron.planning.stages import stages
from tests.parallel import traffic as counted
from tests.parallel.matrix import make_mesh
from tests.planning.small import VOCAB, batch, config
from tests.ranks import run_ranks

TP: dict[str, Any] = {"model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}
PP: dict[str, Any] = {"pipe_parallel_size": 2}
CP: dict[str, Any] = {"context_parallel_size": 2}
HEADS: dict[str, Any] = {**CP, "context_parallel_method": "all_to_all"}
GPT_J: dict[str, Any] = {"gpt_j_residual": True}
TIED: dict[str, Any] = {"no_weight_tying": False}
AGAIN: dict[str, Any] = {"checkpoint_activations": True}
LOCAL: dict[str, Any] = {"attention_config": [[["local", "global"], "all"]], "sliding_window_width": 3}

NORMS = {**AGAIN, "checkpoint_operations": ["norm"], "checkpoint_first_layers": 3}

LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # processes, ZeRO stage, keys
    **{f"data, ZeRO {stage}": (2, stage, {}) for stage in range(4)},
    "ZeRO 3 with small tensors whole": (2, 3, {"persistence": 64}),
    "data in fp32, ZeRO 2": (2, 2, {"precision": "fp32"}),
    **{f"tensor, ZeRO {stage}": (2, stage, TP) for stage in range(4)},
    **{f"sequence, ZeRO {stage}": (2, stage, SP) for stage in range(4)},
    "sequence beside data, ZeRO 2": (4, 2, {**SP, "pos_emb": "learned"}),
    "parallel residual": (2, 1, {**TP, **GPT_J}),
    "parallel residual, sequence": (2, 0, {**SP, **GPT_J}),
    "parallel residual, dropout": (2, 0, {**TP, **GPT_J, "hidden_dropout": 0.1}),
    "tensor, summed in fp32": (2, 1, {**TP, "fp32_allreduce": True}),
    "sequence, summed in fp32": (2, 1, {**SP, "fp32_allreduce": True}),
    "tensor, recomputed": (2, 1, {**TP, **AGAIN}),
    "sequence, recomputed in pairs": (2, 1, {**SP, **AGAIN, "checkpoint_num_layers": 2}),
    "tensor, recomputed with dropout": (2, 1, {**TP, **AGAIN, "hidden_dropout": 0.1}),
    "parallel residual, some recomputed": (2, 1, {**SP, **GPT_J, **AGAIN, "checkpoint_first_layers": 3}),
    "sequence, norms recomputed": (2, 1, {**SP, **NORMS}),
    "parallel residual, norms recomputed": (2, 1, {**SP, **GPT_J, **NORMS}),
    "norms over heads": (2, 1, {**TP, "use_qk_layernorm": True}),
    "pipeline": (2, 1, PP),
    "pipeline, tied": (2, 1, {**PP, **TIED}),
    "pipeline, a shared table of positions": (4, 1, {"pipe_parallel_size": 4, "pos_emb": "rpe"}),
    "pipeline, tied, beside data": (8, 1, {**PP, **TIED}),
    "pipeline, sequence": (4, 1, {**PP, **SP, **TIED}),
    "pipeline, context": (4, 1, {**PP, **CP}),
    "ring": (2, 1, CP),
    "ring of four, grouped heads": (4, 1, {"context_parallel_size": 4, "num_kv_heads": 2}),
    "ring beside data, ZeRO 3": (4, 3, CP),
    "ring, tensor": (4, 1, {**CP, **TP}),
    "ring, recomputed": (2, 1, {**CP, **AGAIN}),
    "ring, attention recomputed": (2, 1, {**CP, **AGAIN, "checkpoint_operations": ["attention"]}),
    "ring, local layers": (4, 1, {"context_parallel_size": 4, **LOCAL}),
    "all to all": (2, 1, HEADS),
    "all to all, grouped heads, recomputed": (2, 1, {**HEADS, **AGAIN, "num_kv_heads": 2}),
}
NUMBERS = 200
"""Bytes of single numbers that a plan leaves out: norms, token counts, sums of losses, lengths of buffers."""


def _counted(processes: int, stage: int, keys: dict[str, Any]) -> tuple[int, dict[tuple[str, str], int]]:
    """Run inside a rank: its pipeline stage, and the bytes of its second step; shapes are told in the first."""
    resolved = _config(processes, stage, keys)
    mesh = make_mesh(resolved)
    engine = build_engine(resolved, mesh, build_model(resolved, VOCAB, mesh), build_objective())
    engine.train_step([batch(resolved) for _ in range(2)], 0)
    with counted.Traffic(mesh) as found:
        engine.train_step([batch(resolved) for _ in range(2)], 1)
    dist.barrier()
    ring = resolved.parallel.context_parallel_method == "ring"
    names = {"all_to_all": "send" if ring else "all-to-all"}
    sizes = {(axis, names.get(kind, kind.replace("_", "-"))): size for (axis, kind), size in found.by_axis.items()}
    return mesh.pp.rank, {key: size for key, size in sizes.items() if size > NUMBERS}


def _config(processes: int, stage: int, keys: dict[str, Any]) -> Any:
    return config(processes, stage, **{"num_layers": 4, **keys})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_sends_what_is_planned(name):
    processes, stage, keys = LAYOUTS[name]
    resolved = _config(processes, stage, keys)
    layout = Layout.of(resolved)
    parts = stages(resolved, VOCAB, layout.pp, layout.tp)
    ranks = run_ranks(processes, _counted, processes, stage, keys)
    for index in range(layout.pp):
        planned: dict[tuple[str, str], int] = {}
        for one in traffic(resolved, layout, parts, index):
            planned[one.axis, one.operation] = planned.get((one.axis, one.operation), 0) + one.payload
        found = [sizes for stage_number, sizes in ranks if stage_number == index]
        most = {key: max(sizes.get(key, 0) for sizes in found) for sizes in found for key in sizes}
        assert most == {key: pytest.approx(size, abs=NUMBERS) for key, size in planned.items() if size > NUMBERS}


def test_rings_send_what_they_send():
    assert Traffic("data", "all-reduce", 4, 1000).sent == 1500
    assert Traffic("data", "all-gather", 4, 1000).sent == Traffic("data", "reduce-scatter", 4, 1000).sent == 750
    assert Traffic("pipeline", "send", 4, 1000).sent == 1000


def test_one_gpu_sends_nothing():
    resolved = config(1)
    assert traffic(resolved, Layout(micro_batch=2), stages(resolved, VOCAB, 1), 0) == []


def test_zero_3_gathers_again_what_it_could_not_keep():
    resolved, layout = config(1), Layout(dp=2, zero_stage=3, accumulation=3)
    payload = {live: data_traffic(resolved, layout.changed(live=live), 1000)[1].payload for live in (0, 400, 5000)}
    assert payload == {0: 3 * 2 * 2000, 400: 3 * 2 * 1600, 5000: 3 * 2 * 1000}
