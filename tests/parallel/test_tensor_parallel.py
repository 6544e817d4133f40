"""Tensor and sequence parallelism equal one process: every gradient, the norms, 5 losses, final weights, evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.matrix import assert_equal, make_config, run_layout, run_reference  # isort: skip

from deepspeed.accelerator import get_accelerator

from megatron.engine import local, partial
from megatron.errors import ConfigError, EngineError

GPT_J = {"gpt_j_residual": True}

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"pos_emb": "learned", "no_weight_tying": False},
    "pythia": {**GPT_J, "rotary_pct": 0.5},
    "one norm for both branches": {**GPT_J, "gpt_j_tied": True, "no_weight_tying": False},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "intermediate_size": 96,
        "num_kv_heads": 2,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
    "grouped, gated, with biases": {
        "num_kv_heads": 2,
        "activation": "geglu",
        "norm": "scalenorm",
        "intermediate_size": 72,
    },
    "alibi": {"pos_emb": "alibi"},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 16},
    "sinusoidal": {"pos_emb": "sinusoidal", "sliding_window_width": 5},
    "qk layernorm": {"use_qk_layernorm": True, "num_kv_heads": 2, "apply_query_key_layer_scaling": True},
    "qk rmsnorm": {"use_qk_layernorm": True, "norm": "rmsnorm", **GPT_J},
    "qk scalenorm": {"use_qk_layernorm": True, "norm": "scalenorm"},
    "no norm parameters": {"use_qk_layernorm": True, "norm": "non_parametric_layernorm", "pos_emb": "none"},
}

TP: dict[str, Any] = {"model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}

# In bf16 each rank rounds its partial sums, and gradients of single elements are small beside that.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("dp", "accumulation"), [(1, 4), (2, 1)])
@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_layouts(name: str, dp: int, accumulation: int, stage: int, sequence: bool) -> None:
    model = MODELS[name]
    layout = {"stage": stage, "gradient_accumulation_steps": accumulation, **(SP if sequence else TP)}
    assert_equal(run_layout({**model, **layout}, 2 * dp), run_reference(model), TOLERANCE["fp32"])


@pytest.mark.parametrize("layout", [TP, {**SP, "stage": 1, "checkpoint_activations": True}], ids=["whole", "sequence"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gpt2", "pythia")])
def test_models(name: str, layout: dict[str, Any]) -> None:
    model = MODELS[name]
    assert_equal(run_layout({**model, **layout}, 2, segments=True), run_reference(model, segments=True), 1e-5)


@pytest.mark.parametrize("layer_count", [1, 2])
@pytest.mark.parametrize("layout", [TP, SP], ids=["whole", "sequence"])
def test_recomputation(layout: dict[str, Any], layer_count: int) -> None:
    flat = {**MODELS["pythia"], **layout, "checkpoint_activations": True, "checkpoint_num_layers": layer_count}
    assert_equal(run_layout(flat, 2), run_reference(MODELS["pythia"]), TOLERANCE["fp32"])


@pytest.mark.parametrize("layout", [TP, SP], ids=["whole", "sequence"])
def test_four_ranks_share_a_layer(layout: dict[str, Any]) -> None:
    flat = {**MODELS["gpt2"], **layout, "model_parallel_size": 4, "gradient_accumulation_steps": 2}
    assert_equal(run_layout(flat, 4), run_reference(MODELS["gpt2"]), TOLERANCE["fp32"])


@pytest.mark.parametrize("exact", [False, True], ids=["", "fp32_allreduce"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("layout", [TP, SP], ids=["whole", "sequence"])
def test_bf16(layout: dict[str, Any], stage: int, exact: bool) -> None:
    model = {**MODELS["pythia"], "precision": "bf16"}
    trace = run_layout({**model, **layout, "stage": stage, "fp32_allreduce": exact}, 2)
    assert_equal(trace, run_reference(model), TOLERANCE["bf16"])


@pytest.mark.parametrize("stage", range(4))
def test_fp16(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    model = {**MODELS["gpt2"], "precision": "fp16", "fp16": {"initial_scale_power": 8}}
    assert_equal(run_layout({**model, **SP, "stage": stage}, 2), run_reference(model), 1e-2)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_a_partial_gradient_that_is_not_summed_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, stage: int) -> None:
    for module in (partial, local):
        monkeypatch.setattr(module, "is_partial", lambda parameter, region: False)
    with pytest.raises((EngineError, AssertionError), match=r"copies must be alike|replicas of"):
        run_layout({**MODELS[name], **SP, "stage": stage}, 2)


@pytest.mark.parametrize("more", [{"overlap_comm": True}, {"offload_optimizer": {"device": "cpu"}}], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partial_gradients_however_zero_reduces(stage: int, more: dict[str, Any]) -> None:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 50, **more}
    flat = {**MODELS["pythia"], **SP, "gradient_accumulation_steps": 4, "zero_optimization": zero}
    assert_equal(run_layout(flat, 2), run_reference(MODELS["pythia"]), TOLERANCE["fp32"])


def test_fewer_key_value_heads_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_kv_heads = 1: it cannot be split over model_parallel_size = 2"):
        make_config({"num_kv_heads": 1, **TP}, 2)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({**SP, "seq_length": 11}, "seq_length = 11: sequence_parallel splits it over model_parallel_size = 2"),
        ({**TP, "intermediate_size": 33}, "intermediate_size = 33: the MLP has 33 .* model_parallel_size = 2"),
        ({**TP, "activation": "swiglu"}, "intermediate_size = null: the MLP has 43 features in each branch"),
        ({"sequence_parallel": True, "model_parallel_size": 1}, None),
    ],
)
def test_what_does_not_divide_is_refused(flat: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert make_config(flat, 2).parallel.sequence_parallel
        return
    with pytest.raises(ConfigError, match=message):
        make_config(flat, 2)
