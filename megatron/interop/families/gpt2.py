"""GPT-2 and GPT-3 shapes: learned positions, sequential blocks, all linear weights stored as [in, out]."""

from __future__ import annotations

from typing import Any

from megatron.config.schema.config import Config
from megatron.config.schema.model import ModelConfig
from megatron.interop.family import (
    PLAIN_ACTIVATIONS,
    PLAIN_DECODER,
    Family,
    HfConfig,
    common_from_hf,
    hf_activation,
    layer_norm,
    our_activation,
    require_values,
)
from megatron.interop.rules import Rule, StackedQKV, Transposed, Zeros, per_layer, same
from megatron.model.accounting import mlp_shape


def to_hf(config: Config, rows: int) -> dict[str, Any]:
    """Return config.json."""
    model = config.model
    return {
        "vocab_size": rows,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": mlp_shape(model)[0],
        "n_positions": model.max_position_embeddings,
        "activation_function": hf_activation(config, PLAIN_ACTIVATIONS),
        "layer_norm_epsilon": model.layernorm_epsilon,
        "initializer_range": config.numerics.init_method_std,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": not model.no_weight_tying,
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Return our flat keys; defaults are those of GPT2Config."""
    require_values(
        config,
        {
            "scale_attn_weights": [True],
            "scale_attn_by_inverse_layer_idx": [False],
            "add_cross_attention": [False],
        },
    )
    context = config.get("n_positions", 1024)
    return {
        **common_from_hf(config["vocab_size"], context, config.get("tie_word_embeddings", True)),
        **our_activation(config.get("activation_function", "gelu_new"), PLAIN_ACTIVATIONS, "activation_function"),
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config.get("n_inner") or 4 * config["n_embd"],
        "norm": "layernorm",
        "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "pos_emb": "learned",
        "gpt_j_residual": False,
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
        "init_method_std": config.get("initializer_range", 0.02),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of all weights."""
    top: list[Rule] = [
        same("embedding.word_embeddings.weight", "transformer.wte.weight"),
        same("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *layer_norm("final_norm", "transformer.ln_f", model),
    ]
    if model.no_weight_tying:
        top.append(same("head.weight", "lm_head.weight"))
    ours, theirs = "layers.{i}", "transformer.h.{i}"
    layer: list[Rule] = [
        *layer_norm(f"{ours}.input_layernorm", f"{theirs}.ln_1", model),
        *layer_norm(f"{ours}.post_attention_layernorm", f"{theirs}.ln_2", model),
        _qkv(model, f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn", "weight"),
        Transposed((f"{ours}.attention.dense.weight",), (f"{theirs}.attn.c_proj.weight",)),
        Transposed((f"{ours}.mlp.linear1.weight",), (f"{theirs}.mlp.c_fc.weight",)),
        Transposed((f"{ours}.mlp.linear2.weight",), (f"{theirs}.mlp.c_proj.weight",)),
    ]
    hidden = model.hidden_size
    if model.use_bias_in_attn_linear:
        layer.append(_qkv(model, f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn", "bias"))
        layer.append(same(f"{ours}.attention.dense.bias", f"{theirs}.attn.c_proj.bias"))
    else:
        layer.append(Zeros((), (f"{theirs}.attn.c_attn.bias",), (3 * hidden,)))
        layer.append(Zeros((), (f"{theirs}.attn.c_proj.bias",), (hidden,)))
    if model.use_bias_in_mlp:
        layer.append(same(f"{ours}.mlp.linear1.bias", f"{theirs}.mlp.c_fc.bias"))
        layer.append(same(f"{ours}.mlp.linear2.bias", f"{theirs}.mlp.c_proj.bias"))
    else:
        layer.append(Zeros((), (f"{theirs}.mlp.c_fc.bias",), (mlp_shape(model)[0],)))
        layer.append(Zeros((), (f"{theirs}.mlp.c_proj.bias",), (hidden,)))
    return [*top, *per_layer(layer, model.num_layers)]


def _qkv(model: ModelConfig, ours: str, theirs: str, part: str) -> StackedQKV:
    heads = model.num_attention_heads
    return StackedQKV((f"{ours}.{part}",), (f"{theirs}.{part}",), heads, heads, transposed=part == "weight")


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    accepts={
        **PLAIN_DECODER,
        "norm": ["layernorm"],
        "pos_emb": ["learned"],
        "activation": list(PLAIN_ACTIVATIONS),
        "num_kv_heads": [None],
        "gpt_j_residual": [False],
    },
    to_hf=to_hf,
    from_hf=from_hf,
    rules=rules,
    prefix="transformer.",
    heads=["lm_head.weight"],
    ignored=[r".*\.attn\.(bias|masked_bias)"],
)
