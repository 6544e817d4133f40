"""precision: fp8: which linear layers of a block it reaches. Float8 products come in multiples of 16 features."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from megatron.config.draft import Draft, either
from megatron.config.widths import mlp_widths
from megatron.errors import Problem

MULTIPLE = 16
"""`megatron.ops.fp8.MULTIPLE`, which needs torch to be imported; a test holds the two together."""


def layer_shapes(d: Draft) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the weight that one process holds of each linear layer of a block."""
    tp, hidden, heads = d.model_parallel_size, d.hidden_size, d.num_attention_heads
    rows, columns, _ = mlp_widths(d.activation, hidden, d.intermediate_size, d.expansion_factor, d.mlp_multiple_of)
    projected = (heads + 2 * (d.num_kv_heads or heads)) * (hidden // heads)
    return {
        "query_key_value": (projected // tp, hidden),
        "dense": (hidden, hidden // tp),
        "linear1": (rows // tp, hidden),
        "linear2": (hidden, columns // tp),
    }


def other_layers(d: Draft) -> list[str]:
    """Return the layers of a block whose products float8 cannot compute, with their shapes."""
    shapes = layer_shapes(d)
    return [f"{name} {list(shape)}" for name, shape in shapes.items() if any(size % MULTIPLE for size in shape)]


def float8_reaches_a_layer(d: Draft) -> Iterator[Problem]:
    """Every linear layer has hidden_size on one side, and a share of something on the other."""
    if d.precision != "fp8" or len(other_layers(d)) < len(layer_shapes(d)):
        return
    hidden, tp = d.hidden_size, d.model_parallel_size
    why = f"float8 products come in multiples of {MULTIPLE} features, and "
    if hidden % MULTIPLE == 0:
        why += f"no linear layer's share of model_parallel_size = {tp} is so wide: {', '.join(other_layers(d))}."
        yield d.problem("precision", "fp8", why, "Use fewer tensor parallel processes, or set precision: bf16")
        return
    step = lcm(MULTIPLE, d.num_attention_heads)
    near = [size for size in (hidden // step * step, (hidden // step + 1) * step) if size]
    fix = f"Set hidden_size to {either(near)}, or precision: bf16"
    yield d.problem("precision", "fp8", f"{why}hidden_size = {hidden} is none.", fix)


def layers_without_float8(d: Draft) -> Iterator[str]:
    """Yield a sentence where some layers stay in bf16."""
    others = other_layers(d) if d.values["precision"] == "fp8" else []
    if others:
        share = f" (shares of model_parallel_size = {d.model_parallel_size})" if d.model_parallel_size > 1 else ""
        place = f"{d.where('precision')}: " if d.where("precision") else ""
        yield (
            f"{place}precision: fp8 leaves {', '.join(others)}{share} in bf16: float8 products come in multiples of "
            f"{MULTIPLE} features."
        )
