"""What a family of models is: a config in both directions, a rule table, and what Hugging Face cannot express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.schema.config import Config
from megatron.config.schema.model import ModelConfig
from megatron.errors import ExportError, Problem
from megatron.interop.rules import Rule, Zeros, same
from megatron.model.accounting import layer_types

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    model_type, architecture: as in config.json.
    accepts: key -> values that the architecture can express; a model with another value is not exported.
    to_hf: our config and the rows of the vocabulary -> config.json.
    from_hf: config.json -> our flat keys; raises ExportError for what we cannot express.
    rules: the table of a model's weights.
    prefix: of all tensors but the head; files of the bare model lack it.
    heads: names of the output matrix, which files of tied models may repeat. aliases: other names -> the rules' names.
    ignored: regular expressions of tensors in old files that are no weights.
    """

    model_type: str
    architecture: str
    accepts: Mapping[str, Sequence[Any]]
    to_hf: Callable[[Config, int], dict[str, Any]]
    from_hf: Callable[[HfConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]
    prefix: str
    heads: Sequence[str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    def obstacles(self, config: Config) -> list[Problem]:
        """Return a problem for every key whose value this architecture cannot express."""
        flat = {**config.flat(), "attention_config": sorted(set(layer_types(config.model)))}
        if not config.model.gpt_j_residual:
            flat["gpt_j_tied"] = False  # it says nothing in a sequential block
        if config.model.num_kv_heads == config.model.num_attention_heads:
            flat["num_kv_heads"] = None
        return [
            Problem(
                what=f"{key} = {flat[key]}",
                why=f"Hugging Face's {self.architecture} cannot express it; it knows {_listed(allowed)}.",
                fix=f"Only models trained with {key} among these can be exported to it.",
            )
            for key, allowed in self.accepts.items()
            if flat[key] not in allowed
        ]


def _listed(values: Sequence[Any]) -> str:
    return ", ".join("unset" if value is None else str(value) for value in values)


# Every architecture so far has these alone; a family's table adds its own.
PLAIN_DECODER: dict[str, Sequence[Any]] = {
    "attention_config": [["global"]],
    "use_qk_layernorm": [False],
    "sliding_window_width": [None],
    "opt_pos_emb_offset": [0],
    "mup_rp_embedding_mult": [1.0],
}

PLAIN_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu", "silu": "silu", "mish": "mish"}
GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")


def hf_activation(config: Config, names: Mapping[str, str]) -> str:
    """Return Hugging Face's name of the activation, the tanh form of gelu where the model used it."""
    if config.model.activation == "gelu" and config.numerics.bias_gelu_fusion:
        return TANH_GELU[0]
    return names[config.model.activation]


def our_activation(hf_name: str, names: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return our activation keys for Hugging Face's name. Raises ExportError where there is none."""
    ours: dict[str, dict[str, Any]] = {theirs: {"activation": name} for name, theirs in names.items()}
    ours["swish"] = ours["silu"]
    if names is PLAIN_ACTIVATIONS:
        ours |= {tanh: {"activation": "gelu", "bias_gelu_fusion": True} for tanh in TANH_GELU}
    if hf_name not in ours:
        raise cannot_import(key, hf_name, sorted(ours))
    return ours[hf_name]


def cannot_import(key: str, value: Any, allowed: Sequence[Any]) -> ExportError:
    """Return the error for a value of config.json that our model cannot express."""
    why = f"This library's decoder cannot express it; it knows {_listed(allowed)}."
    return ExportError(Problem(f"{key} = {value} in config.json", why, "Import another model."))


def require_values(config: HfConfig, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Raise ExportError for the first key of config.json that is present with a value outside `allowed`."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise cannot_import(key, config[key], values)


def rope(config: HfConfig) -> dict[str, Any]:
    """Return theta and the rotated share from config.json, in the form of any version of transformers.

    Raises ExportError for scaled rotary positions.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", None):
        raise cannot_import("rope_type", kind, ["default"])
    return {
        "theta": given.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10000))),
        "share": given.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct"))),
    }


def layer_norm(ours: str, theirs: str, model: ModelConfig) -> list[Rule]:
    """Return the rules of one layernorm, whose offset may not exist here."""
    bias: Rule = (
        same(f"{ours}.bias", f"{theirs}.bias")
        if model.use_bias_in_norms
        else Zeros((), (f"{theirs}.bias",), (model.hidden_size,))
    )
    return [same(f"{ours}.weight", f"{theirs}.weight"), bias]


def gated_width(branch: int) -> dict[str, int]:
    """Return the keys that make each branch of a gated MLP exactly `branch` wide."""
    return {"intermediate_size": branch, "mlp_multiple_of": branch}


def common_from_hf(rows: int, context: int, tied: bool) -> dict[str, Any]:
    """Return the keys that every imported model has.

    rows: of the vocabulary, padding included. context: most positions.
    """
    return {
        "seq_length": context,
        "max_position_embeddings": context,
        "no_weight_tying": not tied,
        "make_vocab_size_divisible_by": next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if rows % size == 0),
    }
