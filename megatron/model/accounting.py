"""Parameters and FLOPs of a model from its configuration alone, without torch.

These are closed formulas, not a walk over modules, so that they check the model as an independent oracle
and cost nothing in `--check`. Shapes: h hidden, n heads, k key-value heads, d = h/n, f MLP branch width,
L layers, s sequence, v padded vocabulary.
"""

from __future__ import annotations

from megatron.config.attention import expand_attention
from megatron.config.schema.model import ModelConfig
from megatron.config.widths import mlp_widths


def layer_types(model: ModelConfig) -> list[str]:
    """Return the attention type of each layer, with `attention_config` written out."""
    return expand_attention(model.attention_config, model.num_layers)


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel_size: int) -> int:
    """Return `vocab_size` (token ids) rounded up to a multiple of the product of both, as GPT-NeoX does.

    That is the size of a new model; one that begins from a checkpoint keeps the checkpoint's (`Keeper.vocabulary`).
    """
    multiple = divisor * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def mlp_shape(model: ModelConfig) -> tuple[int, int, bool]:
    """Return (rows of linear1, columns of linear2, gated); `config.widths` has the rule."""
    return mlp_widths(
        model.activation, model.hidden_size, model.intermediate_size, model.expansion_factor, model.mlp_multiple_of
    )


def _norm_parameters(model: ModelConfig, width: int) -> int:
    if model.norm == "layernorm":
        return 2 * width if model.use_bias_in_norms else width
    return {"rmsnorm": width, "scalenorm": 1, "non_parametric_layernorm": 0}[model.norm]


def _head_dim(model: ModelConfig) -> int:
    return model.hidden_size // model.num_attention_heads


def _block_matrices(model: ModelConfig) -> int:
    """Return the entries of one block's four weight matrices, which every token is multiplied with."""
    hidden, kv_heads = model.hidden_size, model.num_kv_heads or model.num_attention_heads
    rows, columns, _ = mlp_shape(model)
    attention = (hidden + 2 * kv_heads * _head_dim(model)) * hidden + hidden * hidden
    return attention + rows * hidden + hidden * columns


def _block_vectors(model: ModelConfig) -> int:
    """Return the biases and norm parameters of one block."""
    hidden, kv_heads = model.hidden_size, model.num_kv_heads or model.num_attention_heads
    rows, _, _ = mlp_shape(model)
    norms = 1 if model.gpt_j_residual and model.gpt_j_tied else 2
    total = norms * _norm_parameters(model, hidden)
    if model.use_qk_layernorm:
        total += _norm_parameters(model, hidden)  # one norm [n, d] for queries and keys
    if model.use_bias_in_attn_linear:
        total += hidden + 2 * kv_heads * _head_dim(model) + hidden
    if model.use_bias_in_mlp:
        total += rows + hidden
    return total


def num_non_embedding_parameters(model: ModelConfig) -> int:
    """Return the parameters of the blocks and the final norm: neither embeddings, nor positions, nor head."""
    blocks = model.num_layers * (_block_matrices(model) + _block_vectors(model))
    return blocks + _norm_parameters(model, model.hidden_size)


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return all parameters; tied matrices count once.

    vocab_size: rows of the word embedding, padding included (`padded_vocab_size`).
    """
    matrices = 2 if model.no_weight_tying else 1
    total = num_non_embedding_parameters(model) + matrices * vocab_size * model.hidden_size
    if model.pos_emb == "learned":
        total += (model.max_position_embeddings + model.opt_pos_emb_offset) * model.hidden_size
    if model.pos_emb == "rpe":
        total += model.rpe_num_buckets * model.num_attention_heads
    return total


def _mean_keys(model: ModelConfig, causal: bool) -> float:
    """Return how many keys a query is charged for, over all layers: s or half of it each, less under a window."""
    types, sequence = layer_types(model), model.seq_length
    window = min(model.sliding_window_width or sequence, sequence)
    windowed = types.count("local") or len(types)  # as in DecoderBlocks.masks
    widths = [window] * windowed + [sequence] * (len(types) - windowed)
    return float(sum(width - width * width / (2 * sequence) if causal else width for width in widths))


def flops_per_token(model: ModelConfig, vocab_size: int, causal: bool) -> float:
    """Return the floating point operations of one trained token, forward and backward.

    Six for each matrix entry of the blocks and the head (the embedding's lookup is free), plus attention: 12 L h s
    where every query is charged for every key (causal=False, the convention of nanoGPT, PaLM and torchtitan), half of
    that where only keys that it attends to count (causal=True, as Megatron-LM counts today). Recomputed activations
    are not counted.
    """
    matrices = model.num_layers * _block_matrices(model) + vocab_size * model.hidden_size
    attention = 2 * model.hidden_size * _mean_keys(model, causal)
    return 6.0 * (matrices + attention)
