"""The shape of the decoder."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section


class ModelConfig(Section):
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    expansion_factor: float | None = None
    mlp_multiple_of: int = 1
    seq_length: int
    max_position_embeddings: int
    norm: Literal["layernorm", "rmsnorm", "non_parametric_layernorm", "scalenorm"] = "layernorm"
    layernorm_epsilon: float = 1e-5
    rms_norm_epsilon: float = 1e-8
    scalenorm_epsilon: float = 1e-8
    use_bias_in_norms: bool = True
    use_qk_layernorm: bool = False
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = "learned"
    rotary_pct: float = 1.0
    rotary_emb_base: float = 10000
    rpe_num_buckets: int = 32
    rpe_max_distance: int = 128
    opt_pos_emb_offset: int = 0
    no_weight_tying: bool = False
    activation: Literal[
        "gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"
    ] = "gelu"
    gpt_j_residual: bool = False
    gpt_j_tied: bool = False
    use_bias_in_attn_linear: bool = True
    use_bias_in_mlp: bool = True
    attention_config: list[Any] | None = None
    sliding_window_width: int | None = None
    make_vocab_size_divisible_by: int = 128
