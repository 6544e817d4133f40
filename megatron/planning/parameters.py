"""Every parameter tensor of a decoder, by name and shape, and how the tensor axis splits it.

It follows from the config alone and is written independently of the modules, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron.config.schema.model import ModelConfig
from megatron.model.accounting import mlp_shape


@dataclass(frozen=True)
class Parameter:
    """One tensor. shape: of the whole tensor. dim: the dim that is split over the tensor axis, None where none is."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None

    def numel(self, tp: int = 1) -> int:
        """Return the elements that each of `tp` processes holds."""
        return prod(self.shape) // (tp if self.dim is not None else 1)


@dataclass(frozen=True)
class Item:
    """A part of the model that a pipeline does not cut: `kind` is embedding, block, norm or head."""

    kind: str
    parameters: tuple[Parameter, ...]

    def numel(self, tp: int = 1) -> int:
        """Return the elements that each of `tp` processes holds."""
        return sum(parameter.numel(tp) for parameter in self.parameters)

    def largest(self, tp: int = 1) -> int:
        """Return the elements of the largest tensor that a process holds."""
        return max((parameter.numel(tp) for parameter in self.parameters), default=0)


def items(model: ModelConfig, vocab_size: int) -> list[Item]:
    """Return the parts of the model in order: embedding, blocks, final norm, head.

    vocab_size: rows of the word embedding, padding included. A tied head is listed in the embedding and in the head,
    as the first and the last pipeline stage each hold the table.
    """
    blocks = [Item("block", tuple(_block(model, layer))) for layer in range(model.num_layers)]
    head = "embedding.word_embeddings.weight" if not model.no_weight_tying else "head.weight"
    return [
        Item("embedding", tuple(_embedding(model, vocab_size))),
        *blocks,
        Item("norm", tuple(_norm(model, "final_norm", (model.hidden_size,)))),
        Item("head", (Parameter(head, (vocab_size, model.hidden_size), 0),)),
    ]


def _embedding(model: ModelConfig, vocab_size: int) -> Iterator[Parameter]:
    yield Parameter("embedding.word_embeddings.weight", (vocab_size, model.hidden_size), 0)
    if model.pos_emb == "learned":
        rows = model.max_position_embeddings + model.opt_pos_emb_offset
        yield Parameter("embedding.position_embeddings.weight", (rows, model.hidden_size))


def _block(model: ModelConfig, layer: int) -> Iterator[Parameter]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    width = hidden // heads
    rows = (heads + 2 * (model.num_kv_heads or heads)) * width
    linear1, linear2, _ = mlp_shape(model)
    name = f"layers.{layer}"
    yield from _norm(model, f"{name}.input_layernorm", (hidden,))
    yield from _linear(f"{name}.attention.query_key_value", rows, hidden, 0, model.use_bias_in_attn_linear)
    yield from _linear(f"{name}.attention.dense", hidden, hidden, 1, model.use_bias_in_attn_linear)
    if model.use_qk_layernorm:
        yield from _norm(model, f"{name}.attention.qk_norm", (heads, width), 0)
    if model.pos_emb == "rpe" and layer == 0:  # all layers share one table
        yield Parameter(f"{name}.attention.rpe.weight", (model.rpe_num_buckets, heads), 1)
    if not (model.gpt_j_residual and model.gpt_j_tied):
        yield from _norm(model, f"{name}.post_attention_layernorm", (hidden,))
    yield from _linear(f"{name}.mlp.linear1", linear1, hidden, 0, model.use_bias_in_mlp)
    yield from _linear(f"{name}.mlp.linear2", hidden, linear2, 1, model.use_bias_in_mlp)


def _linear(name: str, rows: int, columns: int, dim: int, bias: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (rows, columns), dim)
    if bias:
        yield Parameter(f"{name}.bias", (rows,), 0 if dim == 0 else None)


def _norm(model: ModelConfig, name: str, shape: tuple[int, ...], split: int | None = None) -> Iterator[Parameter]:
    if model.norm == "non_parametric_layernorm":
        return
    if model.norm == "scalenorm":
        yield Parameter(f"{name}.weight", (1,))
        return
    yield Parameter(f"{name}.weight", shape, split)
    if model.norm == "layernorm" and model.use_bias_in_norms:
        yield Parameter(f"{name}.bias", shape, split)
