"""Counts from the config alone against the built model, and FLOPs against their published formulas."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load import load_config
from megatron.config.resolve import resolve
from megatron.model import accounting
from megatron.model.build import build_model
from megatron.parallel.mesh import Mesh

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 20,
    "max_position_embeddings": 24,
}


def model_config(**keys: Any) -> Any:
    return resolve({**SHAPE, **keys})


def count(config: Any, vocab: int) -> int:
    model = build_model(config, vocab, Mesh.single("meta"), initialized=False)
    return sum(parameter.numel() for parameter in model.parameters())


VARIANTS: list[dict[str, Any]] = [
    *({"norm": norm} for norm in ("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm")),
    *({"pos_emb": name} for name in ("learned", "rotary", "sinusoidal", "rpe", "alibi", "none")),
    *({"activation": name} for name in ("gelu", "swiglu", "geglu", "glu", "bilinear", "relu")),
    {"use_bias_in_norms": False},
    {"no_weight_tying": True},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "use_bias_in_attn_linear": False},
    {"use_bias_in_mlp": False},
    {"gpt_j_residual": True},
    {"gpt_j_residual": True, "gpt_j_tied": True},
    {"use_qk_layernorm": True},
    {"use_qk_layernorm": True, "norm": "rmsnorm", "num_kv_heads": 2},
    {"opt_pos_emb_offset": 2},
    {"intermediate_size": 100},
    {"intermediate_size": 101, "activation": "swiglu"},
    {"intermediate_size": 101, "mlp_multiple_of": 8},
    {"intermediate_size": 101, "mlp_multiple_of": 8, "activation": "swiglu"},
    {"expansion_factor": 2.5},
]


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_parameters_equal_the_built_model(keys: dict[str, Any]) -> None:
    config = model_config(**keys)
    assert accounting.num_parameters(config.model, 96) == count(config, 96)


@pytest.mark.parametrize(
    ("name", "rows"), [("pythia/14M", 50304), ("20B", 50432), ("llama2/70B", 32000), ("mistral/7B", 32000)]
)
def test_full_sizes_equal_the_built_model(name: str, rows: int) -> None:
    config = load_config([name], CONFIGS, ["model_parallel_size=1", "pipe_parallel_size=0"])
    assert accounting.num_parameters(config.model, rows) == count(config, rows)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "tied"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2_as_published(layers: int, hidden: int, heads: int, tied: int) -> None:
    keys = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "max_position_embeddings": 1024}
    assert accounting.num_parameters(model_config(**keys).model, 50257) == tied


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "total"), [(12, 768, 12, 125_226_240), (96, 12288, 96, 174_604_259_328)]
)
def test_gpt3_tied_with_2048_positions(layers: int, hidden: int, heads: int, total: int) -> None:
    keys = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "max_position_embeddings": 2048}
    assert accounting.num_parameters(model_config(**keys).model, 50257) == total


def test_gpt_neox_20b_without_embeddings() -> None:
    model = load_config(["20B"], CONFIGS, planning=True).model
    assert accounting.num_non_embedding_parameters(model) == 19_934_859_264


@pytest.mark.parametrize(
    ("keys", "rows", "columns"),
    [
        ({}, 192, 192),
        ({"activation": "swiglu"}, 128, 64),
        ({"activation": "swiglu", "intermediate_size": 32768, "mlp_multiple_of": 256}, 22016, 11008),
        ({"activation": "swiglu", "intermediate_size": 14336, "mlp_multiple_of": 14336}, 28672, 14336),
        ({"activation": "swiglu", "intermediate_size": 14336}, 9558, 4779),
        ({"activation": "swiglu", "hidden_size": 32}, 86, 43),
        ({"intermediate_size": 7, "mlp_multiple_of": 4}, 8, 8),
        ({"intermediate_size": 9, "mlp_multiple_of": 4}, 12, 12),
        ({"expansion_factor": 2.5}, 120, 120),
    ],
)
def test_mlp_widths(keys: dict[str, Any], rows: int, columns: int) -> None:
    gated = keys.get("activation") == "swiglu"
    assert accounting.mlp_shape(model_config(**keys).model) == (rows, columns, gated)


def test_mlp_widths_are_gpt_neox_s_where_its_two_numbers_agree() -> None:
    for width, multiple, gated in product(range(6, 120, 5), (1, 2, 4, 8), (False, True)):
        keys = {"intermediate_size": width, "mlp_multiple_of": multiple, "activation": "swiglu" if gated else "gelu"}
        total = int(2 * width / 3) if gated else width
        linear1 = -(-total // (2 * multiple)) * 2 * multiple
        linear2 = -(-(total // 2 if gated else total) // multiple) * multiple
        if linear2 == (linear1 // 2 if gated else linear1):
            assert accounting.mlp_shape(model_config(**keys).model) == (linear1, linear2, gated)


def test_vocabulary_padding() -> None:
    assert accounting.padded_vocab_size(50257, 128, 1) == 50304
    assert accounting.padded_vocab_size(50304, 128, 1) == 50304
    published = {1: 50304, 2: 50432, 4: 50688}  # Pythia 1.4B; GPT-NeoX-20B and Pythia 6.9B; Pythia 12B
    assert {tp: accounting.padded_vocab_size(50277, 128, tp) for tp in published} == published
    assert accounting.padded_vocab_size(1, 128, 3) == 384
    assert accounting.padded_vocab_size(32000, 1, 8) == 32000


def test_flops_follow_both_conventions() -> None:
    model = load_config(["125M"], CONFIGS).model
    layers, hidden, sequence, vocab = 12, 768, 2048, 50304
    matrices = 72 * layers * hidden**2 + 6 * hidden * vocab
    assert accounting.flops_per_token(model, vocab, causal=False) == matrices + 12 * layers * hidden * sequence
    assert accounting.flops_per_token(model, vocab, causal=True) == matrices + 6 * layers * hidden * sequence


def test_flops_of_a_window_are_those_of_the_keys_it_sees() -> None:
    model = model_config(sliding_window_width=5).model
    without = accounting.flops_per_token(model_config(seq_length=1).model, 0, causal=False) - 12 * 3 * 48
    assert accounting.flops_per_token(model, 0, causal=False) == without + 12 * 3 * 48 * 5
    mean = 5 - 25 / 40
    assert accounting.flops_per_token(model, 0, causal=True) == pytest.approx(without + 12 * 3 * 48 * mean)


def test_layer_types() -> None:
    assert accounting.layer_types(model_config().model) == ["global"] * 3
    assert (
        accounting.layer_types(model_config(attention_config=[[["Flash", "global", "flash"], "all"]]).model)
        == ["global"] * 3
    )
    assert (
        accounting.layer_types(model_config(attention_config=[[["flash"], 2], [["global"], 1]]).model) == ["global"] * 3
    )
