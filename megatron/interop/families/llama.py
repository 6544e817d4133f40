"""LLaMA 1 to 3 without scaled positions: RMSNorm, rotary over the whole head, gated MLP, grouped-query attention."""

from __future__ import annotations

from typing import Any

from megatron.config.schema.config import Config
from megatron.config.schema.model import ModelConfig
from megatron.interop.family import (
    GATED_ACTIVATIONS,
    PLAIN_DECODER,
    Family,
    HfConfig,
    cannot_import,
    common_from_hf,
    gated_width,
    hf_activation,
    our_activation,
    require_values,
    rope,
)
from megatron.interop.rules import Halves, Rule, SplitQKV, per_layer, same
from megatron.model.accounting import mlp_shape


def to_hf(config: Config, rows: int) -> dict[str, Any]:
    """Return config.json, with the rotary base in the form of transformers 4 and of 5."""
    model = config.model
    return {
        "vocab_size": rows,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "intermediate_size": mlp_shape(model)[1],
        "hidden_act": hf_activation(config, GATED_ACTIVATIONS),
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": config.numerics.init_method_std,
        "rms_norm_eps": model.rms_norm_epsilon,
        "attention_bias": model.use_bias_in_attn_linear,
        "mlp_bias": model.use_bias_in_mlp,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.no_weight_tying,
        "rope_theta": model.rotary_emb_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_emb_base},
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Return our flat keys; defaults are those of LlamaConfig."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    turned = rope(config)
    if turned["share"] not in (None, 1.0):
        raise cannot_import("partial_rotary_factor", turned["share"], [1.0])
    require_values(config, {"head_dim": [None, hidden // heads], "pretraining_tp": [None, 1]})
    context = config.get("max_position_embeddings", 2048)
    return {
        **common_from_hf(config["vocab_size"], context, config.get("tie_word_embeddings", False)),
        **our_activation(config.get("hidden_act", "silu"), GATED_ACTIVATIONS, "hidden_act"),
        **gated_width(config["intermediate_size"]),
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "pos_emb": "rotary",
        "rotary_pct": 1.0,
        "rotary_emb_base": turned["theta"],
        "gpt_j_residual": False,
        "use_bias_in_attn_linear": config.get("attention_bias", False),
        "use_bias_in_mlp": config.get("mlp_bias", False),
        "init_method_std": config.get("initializer_range", 0.02),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of all weights."""
    top: list[Rule] = [
        same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        same("final_norm.weight", "model.norm.weight"),
    ]
    if model.no_weight_tying:
        top.append(same("head.weight", "lm_head.weight"))
    ours, theirs = "layers.{i}", "model.layers.{i}"
    layer: list[Rule] = [
        same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight"),
        same(f"{ours}.post_attention_layernorm.weight", f"{theirs}.post_attention_layernorm.weight"),
    ]
    for part in ["weight", "bias"] if model.use_bias_in_attn_linear else ["weight"]:
        layer.append(_qkv(model, ours, theirs, part))
        layer.append(same(f"{ours}.attention.dense.{part}", f"{theirs}.self_attn.o_proj.{part}"))
    for part in ["weight", "bias"] if model.use_bias_in_mlp else ["weight"]:
        names = (f"{theirs}.mlp.up_proj.{part}", f"{theirs}.mlp.gate_proj.{part}")
        layer.append(Halves((f"{ours}.mlp.linear1.{part}",), names))
        layer.append(same(f"{ours}.mlp.linear2.{part}", f"{theirs}.mlp.down_proj.{part}"))
    return [*top, *per_layer(layer, model.num_layers)]


def _qkv(model: ModelConfig, ours: str, theirs: str, part: str) -> SplitQKV:
    heads = model.num_attention_heads
    names = tuple(f"{theirs}.self_attn.{letter}_proj.{part}" for letter in "qkv")
    return SplitQKV((f"{ours}.attention.query_key_value.{part}",), names, heads, model.num_kv_heads or heads)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    accepts={
        **PLAIN_DECODER,
        "norm": ["rmsnorm"],
        "pos_emb": ["rotary"],
        "rotary_pct": [1.0],
        "activation": list(GATED_ACTIVATIONS),
        "gpt_j_residual": [False],
    },
    to_hf=to_hf,
    from_hf=from_hf,
    rules=rules,
    prefix="model.",
    heads=["lm_head.weight"],
    ignored=[r".*\.rotary_emb\.inv_freq"],
)
