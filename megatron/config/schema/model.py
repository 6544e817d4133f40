"""The shape of the decoder."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section, setting

NormName = Literal["layernorm", "rmsnorm", "non_parametric_layernorm", "scalenorm"]
PositionName = Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"]
ActivationName = Literal[
    "gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"
]

GATED_ACTIVATIONS = ("geglu", "reglu", "swiglu", "bilinear", "glu")


class ModelConfig(Section):
    """Everything that decides which parameters exist, and the formula of the forward pass."""

    num_layers: int = setting(..., "Number of decoder blocks.", unit="layers", ge=1, le=100_000)
    hidden_size: int = setting(
        ..., "Width of the residual stream; a multiple of num_attention_heads.", unit="features", ge=1, le=2**20
    )
    num_attention_heads: int = setting(..., "Query heads of each attention layer.", unit="heads", ge=1, le=2**20)
    num_kv_heads: int | None = setting(
        None,
        "Key and value heads (grouped-query attention); must divide num_attention_heads. Unset: one per query head.",
        unit="heads",
        ge=1,
    )
    intermediate_size: int | None = setting(
        None,
        "MLP width before the rule of gated activations: plain MLPs use it as it is; in gated ones each branch is a "
        "third of it, rounded up to mlp_multiple_of, so setting both keys to the true width makes the branch exactly "
        "that wide. Unset: expansion_factor times hidden_size.",
        unit="features",
        ge=1,
    )
    expansion_factor: float | None = setting(
        None,
        "MLP width as a multiple of hidden_size where intermediate_size is unset. Unset: 4.",
        unit="ratio",
        gt=0,
    )
    mlp_multiple_of: int = setting(1, "MLP branch widths are rounded up to a multiple of this.", unit="features", ge=1)
    seq_length: int = setting(..., "Tokens of context in training; a sample holds one more.", unit="tokens", ge=1)
    max_position_embeddings: int = setting(
        ...,
        "Rows of the learned position table and longest context of the model; at least seq_length.",
        unit="tokens",
        ge=1,
    )
    norm: NormName = setting("layernorm", "Normalisation before attention, before the MLP and before the head.")
    layernorm_epsilon: float = setting(
        1e-5, "Added to the variance in layernorm and non_parametric_layernorm.", unit="variance", gt=0
    )
    rms_norm_epsilon: float = setting(1e-8, "Added to the mean square in rmsnorm.", unit="mean square", gt=0)
    scalenorm_epsilon: float = setting(1e-8, "Least L2 norm that scalenorm divides by.", unit="L2 norm", gt=0)
    use_bias_in_norms: bool = setting(True, "Whether layernorm has an additive bias.")
    use_qk_layernorm: bool = setting(
        False, "Normalise each query and key head over its features before positions are applied."
    )
    pos_emb: PositionName = setting("learned", "How positions enter the model.")
    rotary_pct: float = setting(
        1.0, "Leading share of each head's features that rotary positions rotate.", unit="fraction", gt=0, le=1
    )
    rotary_emb_base: float = setting(10000, "Base of the rotary frequencies (theta).", unit="ratio", gt=0)
    rpe_num_buckets: int = setting(32, "Buckets of the relative position bias (pos_emb: rpe).", unit="buckets", ge=2)
    rpe_max_distance: int = setting(
        128, "Distance from which the relative position bias uses its last bucket.", unit="tokens", ge=1
    )
    opt_pos_emb_offset: int = setting(
        0, "Added to the position number before the learned table is read (2 in OPT).", unit="positions", ge=0
    )
    no_weight_tying: bool = setting(
        False, "True: the output head has a matrix of its own. False: it is the word embedding's."
    )
    activation: ActivationName = setting(
        "gelu", "MLP activation; geglu, reglu, swiglu, bilinear and glu are gated: act(gate) * value."
    )
    gpt_j_residual: bool = setting(
        False, "Parallel residual: x + attention(norm(x)) + mlp(norm(x)) instead of one after the other."
    )
    gpt_j_tied: bool = setting(False, "With gpt_j_residual: both branches read the same norm.")
    use_bias_in_attn_linear: bool = setting(True, "Biases in the query-key-value and attention output projections.")
    use_bias_in_mlp: bool = setting(True, "Biases in the MLP's two projections.")
    attention_config: list[Any] | None = setting(
        None,
        'Attention type of each layer: a list of num_layers names, or [[[names], repeats or "all"], ...]. "global" is '
        'causal attention and "flash" another name for it, since attention_backend says what computes it; "local" sees '
        "sliding_window_width tokens. Unset: global.",
    )
    sliding_window_width: int | None = setting(
        None,
        "Each token attends to itself and at most this many tokens before it, in the local layers of attention_config, "
        "or in every layer where none is local. Unset: to all of them.",
        unit="tokens",
        ge=1,
    )
    make_vocab_size_divisible_by: int = setting(
        128,
        "The vocabulary of a new model is padded to a multiple of this times model_parallel_size. A run that begins "
        "from a checkpoint keeps the checkpoint's size, at any model_parallel_size that divides it.",
        unit="token ids",
        ge=1,
    )
