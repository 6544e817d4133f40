"""Pipelines equal one process: losses, norms, the gradient of every parameter, weights and evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.matrix import assert_equal, run_layout, run_reference

MODELS: dict[str, dict[str, Any]] = {
    "pythia": {"gpt_j_residual": True},
    "gpt2": {"pos_emb": "learned", "no_weight_tying": False},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_mlp": False},
    "tied, serial": {"no_weight_tying": False, "num_layers": 3},
    "rpe": {"pos_emb": "rpe", "num_layers": 3},
    "alibi, tied norms": {"pos_emb": "alibi", "gpt_j_residual": True, "gpt_j_tied": True, "no_weight_tying": False},
}

# model, stages, replicas, accumulation, more keys
CASES = [
    *((name, 2, 1, 4, {}) for name in MODELS),
    *(("tied, serial", 2, replicas, accumulation, {}) for replicas in (1, 2) for accumulation in (1, 2, 4)),
    ("tied, serial", 4, 1, 2, {}),
    ("rpe", 3, 1, 2, {}),
    ("gpt2", 2, 2, 2, {"stage": 0}),
    ("gpt2", 2, 1, 4, {"checkpoint_activations": True}),
    ("tied, serial", 2, 1, 2, {"checkpoint_activations": True, "checkpoint_num_layers": 2}),
    ("pythia", 2, 1, 2, {"pipe_partition_method": "uniform"}),
    ("pythia", 2, 1, 2, {"pipe_partition_method": "type:transformer|mlp"}),
    ("pythia", 2, 2, 2, {"gradient_clipping": 0.0, "weight_decay": 0.0}),
]


def layout(name: str, stages: int, accumulation: int, more: dict[str, Any]) -> dict[str, Any]:
    sizes = {"pipe_parallel_size": stages, "gradient_accumulation_steps": accumulation}
    return {"stage": 1, **sizes, **MODELS[name], **more}


@pytest.mark.parametrize(("name", "stages", "replicas", "accumulation", "more"), CASES)
def test_a_pipeline_equals_one_process(name, stages, replicas, accumulation, more):
    flat = layout(name, stages, accumulation, more)
    trace = run_layout(flat, stages * replicas, segments=True)
    assert_equal(
        trace, run_reference({key: v for key, v in flat.items() if key != "pipe_partition_method"}, True), 1e-5
    )


@pytest.mark.parametrize(("replicas", "accumulation"), [(1, 4), (2, 1), (2, 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_equals_one_process_to_its_rounding(precision, replicas, accumulation):
    flat = layout("tied, serial", 2, accumulation, {"precision": precision})
    assert_equal(run_layout(flat, 2 * replicas), run_reference(flat), 3e-2 if precision == "bf16" else 4e-3)
