"""Context parallel layouts equal one process: losses, norms, the gradient of every parameter, weights, evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.matrix import assert_equal, run_layout, run_reference

WINDOW = {"attention_config": [[["local", "global"], "all"]], "sliding_window_width": 3}
MODELS: dict[str, dict[str, Any]] = {
    "pythia": {"gpt_j_residual": True},
    "gpt2": {"pos_emb": "learned", "no_weight_tying": False},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "alibi": {"pos_emb": "alibi"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "mlp_multiple_of": 4},
    "mqa": {"num_kv_heads": 1},
    "local": WINDOW,
    "qk norm": {"use_qk_layernorm": True, "apply_query_key_layer_scaling": True, "num_kv_heads": 2},
    "rpe": {"pos_emb": "rpe"},
    "long": {"seq_length": 16, "max_position_embeddings": 16},
}
HEADS = {"context_parallel_method": "all_to_all"}

# model, context size, data size, keys
CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    *((name, 2, 1, {}) for name in MODELS if name != "rpe"),
    *((name, 2, 1, HEADS) for name in MODELS if name != "mqa"),
    *(("llama", 2, 2, {"stage": stage, "gradient_accumulation_steps": 2}) for stage in range(4)),
    *(("gpt2", 2, 1, {"stage": stage, "gradient_accumulation_steps": 4}) for stage in range(4)),
    ("gpt2", 3, 1, {"stage": 1}),
    ("long", 4, 1, {"stage": 1}),
    ("long", 4, 1, {**HEADS, **WINDOW}),
    ("gpt2", 2, 1, {"checkpoint_activations": True, "stage": 2}),
    ("gpt2", 2, 1, {"checkpoint_activations": True, **HEADS}),
    ("gpt2", 2, 1, {"model_parallel_size": 2}),
    ("llama", 2, 1, {"model_parallel_size": 2, "sequence_parallel": True, "stage": 1}),
    ("alibi", 2, 1, {"model_parallel_size": 2, "sequence_parallel": True, **HEADS}),
    ("rpe", 2, 1, {"model_parallel_size": 2, "sequence_parallel": True, **HEADS}),
    ("gpt2", 2, 1, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2, "stage": 1}),
    ("local", 2, 2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2, "stage": 1, **HEADS}),
]


def layout(name: str, context: int, data: int, keys: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the flat keys and the number of processes."""
    flat = {**MODELS[name], "context_parallel_size": context, **keys}
    return flat, context * data * keys.get("model_parallel_size", 1) * keys.get("pipe_parallel_size", 1)


@pytest.mark.parametrize(("name", "context", "data", "keys"), CASES)
def test_a_divided_sequence_equals_one_process(name: str, context: int, data: int, keys: dict[str, Any]) -> None:
    flat, processes = layout(name, context, data, keys)
    reference = {key: value for key, value in flat.items() if key != "context_parallel_method"}
    assert_equal(run_layout(flat, processes), run_reference(reference), 1e-5)


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_documents_do_not_see_each_other_across_ranks(method: str) -> None:
    flat = {**MODELS["llama"], "context_parallel_size": 2, "context_parallel_method": method}
    reference = run_reference(MODELS["llama"], segments=True)
    assert_equal(run_layout(flat, 2, segments=True), reference, 1e-5)
    assert abs(reference.losses[0] - run_reference(MODELS["llama"]).losses[0]) > 1e-4


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_equals_one_process_to_its_rounding(stage: int, method: str) -> None:
    model = {**MODELS["llama"], "precision": "bf16"}
    flat = {**model, "context_parallel_size": 2, "context_parallel_method": method, "stage": stage}
    assert_equal(run_layout(flat, 2), run_reference(model), 3e-2)


def test_dropout_draws_masks_of_its_own_on_each_rank_and_again_when_recomputed() -> None:
    keys = {**HEADS, "context_parallel_size": 2, "attention_dropout": 0.2, "hidden_dropout": 0.2}
    first = run_layout({**MODELS["gpt2"], **keys}, 2)
    again = run_layout({**MODELS["gpt2"], **keys, "checkpoint_activations": True}, 2)
    assert_equal(again, first, 1e-5)
    assert abs(first.losses[0] - run_reference(MODELS["gpt2"]).losses[0]) > 1e-4
