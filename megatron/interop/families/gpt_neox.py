"""GPT-NeoX-20B, Pythia and all that GPTNeoXForCausalLM expresses; QKV rows lie head by head on both sides."""

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
    rope,
)
from megatron.interop.rules import Rule, Zeros, per_layer, same
from megatron.model.accounting import mlp_shape


def to_hf(config: Config, rows: int) -> dict[str, Any]:
    """Return config.json, with rotary keys in the form of transformers 4 and of 5."""
    model = config.model
    return {
        "vocab_size": rows,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": mlp_shape(model)[0],
        "hidden_act": hf_activation(config, PLAIN_ACTIVATIONS),
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": config.numerics.init_method_std,
        "layer_norm_eps": model.layernorm_epsilon,
        "use_parallel_residual": model.gpt_j_residual,
        "attention_bias": model.use_bias_in_attn_linear,
        "tie_word_embeddings": not model.no_weight_tying,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_pct": model.rotary_pct,
        "rotary_emb_base": model.rotary_emb_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_emb_base,
            "partial_rotary_factor": model.rotary_pct,
        },
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Return our flat keys; defaults are those of GPTNeoXConfig."""
    turned = rope(config)
    context = config.get("max_position_embeddings", 2048)
    return {
        **common_from_hf(config["vocab_size"], context, config.get("tie_word_embeddings", False)),
        **our_activation(config.get("hidden_act", "gelu"), PLAIN_ACTIVATIONS, "hidden_act"),
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config.get("intermediate_size", 4 * config["hidden_size"]),
        "norm": "layernorm",
        "layernorm_epsilon": config.get("layer_norm_eps", 1e-5),
        "pos_emb": "rotary",
        "rotary_pct": 0.25 if turned["share"] is None else turned["share"],
        "rotary_emb_base": turned["theta"],
        "gpt_j_residual": config.get("use_parallel_residual", True),
        "gpt_j_tied": False,
        "use_bias_in_attn_linear": config.get("attention_bias", True),
        "use_bias_in_mlp": True,
        "init_method_std": config.get("initializer_range", 0.02),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of all weights."""
    top: list[Rule] = [
        same("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight"),
        *layer_norm("final_norm", "gpt_neox.final_layer_norm", model),
    ]
    if model.no_weight_tying:
        top.append(same("head.weight", "embed_out.weight"))
    ours, theirs = "layers.{i}", "gpt_neox.layers.{i}"
    layer: list[Rule] = [
        *layer_norm(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", model),
        *layer_norm(f"{ours}.post_attention_layernorm", f"{theirs}.post_attention_layernorm", model),
        same(f"{ours}.attention.query_key_value.weight", f"{theirs}.attention.query_key_value.weight"),
        same(f"{ours}.attention.dense.weight", f"{theirs}.attention.dense.weight"),
        same(f"{ours}.mlp.linear1.weight", f"{theirs}.mlp.dense_h_to_4h.weight"),
        same(f"{ours}.mlp.linear2.weight", f"{theirs}.mlp.dense_4h_to_h.weight"),
    ]
    if model.use_bias_in_attn_linear:
        layer.append(same(f"{ours}.attention.query_key_value.bias", f"{theirs}.attention.query_key_value.bias"))
        layer.append(same(f"{ours}.attention.dense.bias", f"{theirs}.attention.dense.bias"))
    if model.use_bias_in_mlp:
        layer.append(same(f"{ours}.mlp.linear1.bias", f"{theirs}.mlp.dense_h_to_4h.bias"))
        layer.append(same(f"{ours}.mlp.linear2.bias", f"{theirs}.mlp.dense_4h_to_h.bias"))
    else:
        layer.append(Zeros((), (f"{theirs}.mlp.dense_h_to_4h.bias",), (mlp_shape(model)[0],)))
        layer.append(Zeros((), (f"{theirs}.mlp.dense_4h_to_h.bias",), (model.hidden_size,)))
    return [*top, *per_layer(layer, model.num_layers)]


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    accepts={
        **PLAIN_DECODER,
        "norm": ["layernorm"],
        "pos_emb": ["rotary"],
        "activation": list(PLAIN_ACTIVATIONS),
        "num_kv_heads": [None],
        "gpt_j_tied": [False],
    },
    to_hf=to_hf,
    from_hf=from_hf,
    rules=rules,
    prefix="gpt_neox.",
    heads=["embed_out.weight", "lm_head.weight"],
    aliases={"lm_head.weight": "embed_out.weight"},
    ignored=[r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"],
)
