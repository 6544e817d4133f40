"""Every parameter tensor of a decoder, by name and shape, and how the tensor axis splits it.

It follows from the config alone and is written independently of the modules, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron.config.schema.model import ModelConfig
from megatron.model.accounting import mlp_shape

_WORDS = "embedding.word_embeddings.weight"
_NORMS = {
    "layernorm": "LayerNorm",
    "non_parametric_layernorm": "LayerNorm",
    "rmsnorm": "RMSNorm",
    "scalenorm": "ScaleNorm",
}


@dataclass(frozen=True)
class Parameter:
    """One tensor. shape: of the whole tensor. dim: the dim that is split over the tensor axis, None where none is.

    partial: where the gradient of a tensor that is not split is a part of the whole on each of the axis's processes:
        "tensor" always, "sequence" under sequence_parallel, "" never."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    partial: str = ""

    def numel(self, tp: int = 1) -> int:
        """Return the elements that each of `tp` processes holds."""
        return prod(self.shape) // (tp if self.dim is not None else 1)


@dataclass(frozen=True)
class Item:
    """A layer of the model. kind: embedding, block, norm or head. title: its name and its class."""

    kind: str
    parameters: tuple[Parameter, ...]
    title: tuple[str, str]

    def numel(self, tp: int = 1) -> int:
        """Return the elements that each of `tp` processes holds."""
        return sum(parameter.numel(tp) for parameter in self.parameters)

    def largest(self, tp: int = 1) -> int:
        """Return the elements of the largest tensor that a process holds."""
        return max((parameter.numel(tp) for parameter in self.parameters), default=0)


def items(model: ModelConfig, vocab_size: int, dropout: bool = False) -> list[Item]:
    """Return the layers of the model in order: embedding, blocks, final norm, head.

    vocab_size: rows of the word embedding, padding included. dropout: there is hidden dropout. A tied head is listed
    in the embedding and in the head, and a table that blocks share in each of them, as each pipeline stage that has one
    of them holds it.
    """
    block_class = "ParallelBlock" if model.gpt_j_residual else "PreNormBlock"
    blocks = [
        Item("block", tuple(_block(model, layer)), (f"layers.{layer}", block_class))
        for layer in range(model.num_layers)
    ]
    tied = not model.no_weight_tying
    table = Parameter(_WORDS if tied else "head.weight", (vocab_size, model.hidden_size), 0)
    classes = ("TiedEmbedding", "TiedEmbedding") if tied else ("VocabParallelEmbedding", "LanguageHead")
    words = Item("embedding", (Parameter(_WORDS, table.shape, 0),), ("embedding.word_embeddings", classes[0]))
    norm = Item("norm", tuple(_norm(model, "final_norm", (model.hidden_size,))), ("final_norm", _NORMS[model.norm]))
    return [words, *_before_blocks(model, dropout), *blocks, norm, Item("head", (table,), ("head", classes[1]))]


def _before_blocks(model: ModelConfig, dropout: bool) -> Iterator[Item]:
    if model.pos_emb in ("learned", "sinusoidal"):
        name = "embedding.position_embeddings"
        shape = (model.max_position_embeddings + model.opt_pos_emb_offset, model.hidden_size)
        held = (Parameter(f"{name}.weight", shape, partial="sequence"),) if model.pos_emb == "learned" else ()
        yield Item("positions", held, (name, f"{model.pos_emb.capitalize()}Positions"))
    if dropout:
        yield Item("dropout", (), ("embedding.dropout", "Dropout"))


def _block(model: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    width = hidden // heads
    rows = (heads + 2 * (model.num_kv_heads or heads)) * width
    linear1, linear2, _ = mlp_shape(model)
    name = f"layers.{layer}"
    partial = "tensor" if model.gpt_j_residual else "sequence"
    yield from _norm(model, f"{name}.input_layernorm", (hidden,), partial=partial)
    yield from _linear(f"{name}.attention.query_key_value", rows, hidden, 0, model.use_bias_in_attn_linear)
    yield from _linear(f"{name}.attention.dense", hidden, hidden, 1, model.use_bias_in_attn_linear)
    if model.use_qk_layernorm:
        yield from _norm(model, f"{name}.attention.qk_norm", (heads, width), 0, "tensor")
    if model.pos_emb == "rpe":  # all layers share one table, which has the first one's name
        yield Parameter("layers.0.attention.rpe.weight", (model.rpe_num_buckets, heads), 1)
    if not (model.gpt_j_residual and model.gpt_j_tied):
        yield from _norm(model, f"{name}.post_attention_layernorm", (hidden,), partial=partial)
    yield from _linear(f"{name}.mlp.linear1", linear1, hidden, 0, model.use_bias_in_mlp)
    yield from _linear(f"{name}.mlp.linear2", hidden, linear2, 1, model.use_bias_in_mlp)


def _linear(name: str, rows: int, columns: int, dim: int, bias: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (rows, columns), dim)
    if bias:
        yield Parameter(f"{name}.bias", (rows,), 0 if dim == 0 else None)


def _norm(
    model: ModelConfig, name: str, shape: tuple[int, ...], split: int | None = None, partial: str = "sequence"
) -> Iterator[Parameter]:
    if model.norm == "non_parametric_layernorm":
        return
    if model.norm == "scalenorm":
        yield Parameter(f"{name}.weight", (1,), partial=partial)
        return
    whole = "" if split is not None else partial
    yield Parameter(f"{name}.weight", shape, split, whole)
    if model.norm == "layernorm" and model.use_bias_in_norms:
        yield Parameter(f"{name}.bias", shape, split, whole)
