"""Initialisation, precision, dropout and the choices that change the arithmetic."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Section

InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]


class NumericsConfig(Section):
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    init_method: InitMethod = "normal"
    output_layer_init_method: InitMethod = "scaled_normal"
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    apply_query_key_layer_scaling: bool = False
    attention_softmax_in_fp32: bool = False
    bias_gelu_fusion: bool = False
    mup_rp_embedding_mult: float = 1.0
    seed: int = 1234
