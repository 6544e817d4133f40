"""Bytes of what the forward pass keeps for the backward pass.

They are counted by storage, as autograd holds them in this library: a view keeps all of what it looks into. For T
tokens, e bytes per element, r rows of linear1, c columns of linear2, a block of a GPT-NeoX model (layernorm, rotary,
gelu) keeps

    x, and the sum before n2       2 e T h     (one with the parallel residual) / tp under sequence_parallel, unless the
                                               norms stand inside the split layers, as with the parallel residual
    n1(x), n2(x)                   2 e T h     kept as they are gathered; nothing where norms are recomputed
    query, key, value as one       e T (n + 2k) d / tp    kept whole by the view of the value
    rotated query and key          e T (n + k) d / tp
    context, its logsumexp         e T n d / tp + 4 T n / tp
    linear1, gelu                  e T (r + c) / tp; the first alone where the activation is recomputed

In fp8 the linear layers keep 1 byte for each element of what they multiply, and each its own: of n1(x) and n2(x) 2 T h
together, of the context T n d / tp beside the attention's own, of gelu T c / tp.

A ring keeps its context once more, in the order that the next layer needs; an exchange of heads keeps query, key and
value of its heads and not the projection that they come from.
Attention is taken to be fused: it keeps no scores. A learned bias costs its mask, in the form the kernels want; a
window or alibi does where attention_backend asks for PyTorch's.
"""

from __future__ import annotations

from megatron.config.schema.config import Config
from megatron.config.schema.model import ModelConfig
from megatron.model.accounting import layer_types, mlp_shape
from megatron.planning.layout import WEIGHT_BYTES, Layout

CHUNK_BYTES = 512 * 2**20
"""megatron.ops.cross_entropy.CUDA_CHUNK_BYTES, which needs torch to be imported; a test holds the two together."""


def tokens(config: Config, layout: Layout) -> int:
    """Return the tokens of one micro-batch on one GPU."""
    return layout.micro_batch * config.model.seq_length // layout.cp


def block_bytes(config: Config, layout: Layout, layer: int = 0) -> int:
    """Return what one block keeps of one micro-batch."""
    model, element, count = config.model, WEIGHT_BYTES[config.numerics.weight_precision], tokens(config, layout)
    operations = layout.operations if layout.recomputes(layer) else ()
    inputs, outputs = _norms_recomputed(model, element) if "norm" in operations else _norms(model, element)
    outputs = 2 * model.hidden_size if _multiplies_in_float8(config) else outputs
    spread = layout.tp if layout.sequence_parallel and not model.gpt_j_residual else 1
    dropped = _dropout(config) // (layout.tp if layout.sequence_parallel else 1)
    split = _attention(config, layout, element, "attention" in operations)
    split += _mlp_recomputed(config, element) if "activation" in operations else _mlp(config, element)
    mask = 0 if "attention" in operations else _mask(config, layout, layer)
    return count * (inputs // spread + outputs + dropped) + count * split // layout.tp + mask


def boundary_bytes(config: Config, layout: Layout) -> int:
    """Return the bytes of the hidden states [b, s, h] between two blocks: what recomputation keeps of them."""
    spread = layout.tp if layout.sequence_parallel else 1
    return tokens(config, layout) * config.model.hidden_size * WEIGHT_BYTES[config.numerics.weight_precision] // spread


def loss_bytes(config: Config, layout: Layout, vocab_size: int) -> int:
    """Return the most that head and loss hold at once.

    The final norm keeps its input; the loss keeps the gradient of the hidden states and of the weight, fp32 where
    there are several chunks, while one chunk's logits are there in the model's type, and where no kernel computes the
    losses, in fp32 besides.
    """
    element, count = WEIGHT_BYTES[config.numerics.weight_precision], tokens(config, layout)
    rows, hidden = vocab_size // layout.tp, config.model.hidden_size
    chunk = max(1, CHUNK_BYTES // (element * rows))
    logits = min(chunk, count) * rows * (element + (4 if config.kernels.cross_entropy_fusion is False else 0))
    weight = rows * hidden * (4 if count > chunk else element)
    copy = rows * hidden * element if count > chunk and element != 4 else 0  # when the fp32 sum is rounded
    return 3 * count * hidden * element + weight + max(logits, copy)


def working_bytes(config: Config, layout: Layout, largest: int) -> int:
    """Return what the backward pass of one block needs beside what was kept: gradients of the MLP's activations and of
    the stream, and the gradient of the largest tensor (`largest` elements) before it is added to the sum; in fp8 both
    copies of a gradient, and the turned weight."""
    element, count = WEIGHT_BYTES[config.numerics.weight_precision], tokens(config, layout)
    rows, columns, _ = mlp_shape(config.model)
    sum_of_one = 4 * largest if layout.at_once and element != 4 else 0  # the gradient in fp32, before it is freed
    rounded = 2 * count * rows // layout.tp + largest if _multiplies_in_float8(config) else 0
    block = count * ((rows + columns) // layout.tp + 2 * config.model.hidden_size)
    return sum_of_one + element * (block + largest) + rounded


def _multiplies_in_float8(config: Config) -> bool:
    return config.numerics.precision == "fp8"


def _norms(model: ModelConfig, element: int) -> tuple[int, int]:
    """Return bytes per token of the norms' inputs, with their statistics, and of their outputs.

    A layernorm keeps its input, which two may share."""
    hidden, parallel = model.hidden_size, model.gpt_j_residual
    norms = 1 if parallel and model.gpt_j_tied else 2
    inputs = 1 if parallel else norms
    outputs = norms * element * hidden
    if model.norm in ("layernorm", "non_parametric_layernorm"):
        return inputs * element * hidden + 8 * norms, outputs
    if model.norm == "scalenorm":  # an fp32 copy of the input; in fp32 the input itself
        return (inputs if element == 4 else norms) * 4 * hidden + 12 * norms, outputs
    if element == 4:
        return (inputs + norms) * 4 * hidden + 4 * norms, outputs  # the input, and the product before the gain
    return norms * (8 * hidden + 4), outputs  # rmsnorm in half precision: the input and the product in fp32


def _norms_recomputed(model: ModelConfig, element: int) -> tuple[int, int]:
    """Return the same where norms are recomputed: their inputs alone, with a layernorm's statistics."""
    inputs = 1 if model.gpt_j_residual else 2
    statistics = 8 * (1 if model.gpt_j_residual and model.gpt_j_tied else 2) if "layernorm" in model.norm else 0
    return inputs * element * model.hidden_size + statistics, 0


def _attention(config: Config, layout: Layout, element: int, recomputed: bool) -> int:
    """Return bytes per token of attention, before the tensor axis splits them by heads.

    The value is a view of the whole projection, the key one of all that is turned; a query is a view of it as well
    unless several heads share a key and a process has several such groups."""
    model, tp = config.model, layout.tp
    heads = model.num_attention_heads
    groups, width = model.num_kv_heads or heads, model.hidden_size // heads
    rotary = model.pos_emb == "rotary"
    normed = 0
    if model.use_qk_layernorm:
        normed = _before_head_norms(model, element, tp)
        groups, features = heads, 3 * heads + (2 * heads if rotary else 0)  # queries, keys and values, and turned
    else:
        copied = heads if heads > groups > tp else 0
        features = heads + 2 * groups + (heads + groups if rotary else 0) + copied
    statistics = 0 if recomputed else 4 * heads
    if layout.cp > 1 and config.parallel.context_parallel_method == "all_to_all" and not recomputed:
        features = 2 * heads + 2 * groups  # of its heads: query, key, value and what they see
    elif layout.cp > 1 and not recomputed:
        features += heads  # a ring's output, before it is put in order
    kept_elsewhere = layout.cp == 1 and not recomputed  # by the attention, which needs its own result
    dense = heads * width * (1 if _multiplies_in_float8(config) else 0 if kept_elsewhere else element)
    return normed + (features + heads * kept_elsewhere) * width * element + dense + statistics


def _before_head_norms(model: ModelConfig, element: int, tp: int) -> int:
    """Return bytes per token of what the norms of queries and keys keep: their inputs; where they compute in fp32
    step by step, those steps."""
    heads, is_layernorm = model.num_attention_heads, model.norm in ("layernorm", "non_parametric_layernorm")
    if model.norm == "rmsnorm" or (tp > 1 and is_layernorm):
        return 16 * model.hidden_size
    if model.norm == "scalenorm" and element == 2:
        return 8 * model.hidden_size
    grouped = (model.num_kv_heads or heads) != heads
    return (2 if grouped else 4) * heads * (model.hidden_size // heads) * element


def _mlp(config: Config, element: int) -> int:
    """Return bytes per token of the MLP, before the tensor axis splits them: the activation's, and linear2's input."""
    model = config.model
    rows, columns, gated = mlp_shape(model)
    inside = {"bilinear": rows, "relu": columns, "softsign": rows + columns}
    activation = inside.get(model.activation, rows + (columns if gated else 0))
    if _multiplies_in_float8(config):
        return element * activation + columns
    return element * (activation + (0 if model.activation == "relu" else columns))


def _mlp_recomputed(config: Config, element: int) -> int:
    """Return bytes per token of an MLP whose activation is recomputed: the output of its first linear map, and in fp8
    what the second multiplies."""
    rows, columns, _ = mlp_shape(config.model)
    return element * rows + (columns if _multiplies_in_float8(config) else 0)


def _dropout(config: Config) -> int:
    """Return bytes per token of the two masks of hidden dropout, a byte per element on a GPU."""
    return 2 * config.model.hidden_size if config.numerics.hidden_dropout else 0


_MASKLESS = ("auto", "triton", "flash2", "flash3")
"""Values of attention_backend under which windows and alibi are numbers for each token."""


def _mask(config: Config, layout: Layout, layer: int) -> int:
    """Return the bytes of a layer's own mask or bias over all pairs of positions, where its back end needs one."""
    model, backend = config.model, config.kernels.attention_backend
    maskless = backend in _MASKLESS and not (backend == "flash3" and model.pos_emb == "alibi")
    if maskless and model.pos_emb != "rpe" and not config.numerics.attention_dropout:
        return 0
    pairs = (model.seq_length // layout.cp) * model.seq_length * WEIGHT_BYTES[config.numerics.weight_precision]
    if model.pos_emb in ("alibi", "rpe"):
        return pairs * model.num_attention_heads // layout.tp
    types = layer_types(model)
    window = model.sliding_window_width if "local" not in types or types[layer] == "local" else None
    return pairs if window is not None and window < model.seq_length - 1 else 0
