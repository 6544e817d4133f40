"""Whether a checkpoint belongs to the model and tokenizer that are about to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from megatron import logs
from megatron.checkpoint.load import CheckpointReader
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import CheckpointError, ConfigError, Problem

logger = logs.get_logger(__name__)

# These change no shape with rotary, alibi or no positions, and are lengthened on purpose when a run goes on with a
# longer context; for learned positions the shapes themselves decide.
_MAY_CHANGE = {"seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"}
_KEEPS_SHAPES = {
    "rotary_emb_base", "rotary_pct", "sliding_window_width", "attention_config", "layernorm_epsilon",
    "rms_norm_epsilon", "scalenorm_epsilon", "gpt_j_residual", "rpe_max_distance", "bias_gelu_fusion",
    "mup_rp_embedding_mult",
}  # fmt: skip
_NUMERICS = ("bias_gelu_fusion", "mup_rp_embedding_mult")  # the numeric choices that are part of the formula


def stored_config(reader: CheckpointReader) -> Config:
    """Return the config that the checkpoint was trained with.

    A checkpoint of an earlier version goes the way of a YAML file: keys that have been renamed or dropped since are
    understood or ignored as they are there. Raises CheckpointError where this version cannot express one of its keys.
    """
    sections = dict(reader.manifest.config)
    try:
        return Config.model_validate(sections)
    except ValidationError:
        flat = {key: value for section in sections.values() for key, value in section.items() if value is not None}
        flat.pop("find_micro_batch_size", None)  # earlier versions kept it beside the size that was found
    try:
        return resolve(flat)
    except ConfigError as error:
        problems = (replace(problem, where=f"{reader.folder}/config.yml") for problem in error.problems)
        raise CheckpointError(*problems) from error


def require_same_model(reader: CheckpointReader, config: Config) -> None:
    """Raise CheckpointError that names every key of the model whose value differs from the checkpoint's.

    Under `finetune`, differences that keep all shapes are a warning, as when a context is extended.
    """
    stored, current = _model_keys(reader.manifest.config), _model_keys(config.model_dump(mode="json"))
    changed = {key: (stored[key], value) for key, value in current.items() if key in stored and stored[key] != value}
    finetune = config.checkpoint.finetune
    allowed = {key for key in changed if key in _MAY_CHANGE or (finetune and key in _KEEPS_SHAPES)}
    for key in sorted(allowed):
        was, now = changed[key]
        logger.warning("%s = %s; the checkpoint %s was trained with %s", key, now, reader.folder, was)
    refused = {key: values for key, values in changed.items() if key not in allowed}
    if refused:
        raise CheckpointError(*(_other_model(reader, key, *values) for key, values in sorted(refused.items())))


_SECTIONS = ("parallel", "batch", "optimizer", "training", "data", "kernels")
_OTHER = {"seed", "precision", "hidden_dropout", "attention_dropout"}
_NO_EFFECT = {"exit_interval", "eval_interval", "eval_iters", "num_workers", "mmap_warmup", "data_index_dir"}


def changed_settings(reader: CheckpointReader, config: Config) -> list[str]:
    """Return "key: then -> now" for the keys outside the model that decide how training goes on."""
    found = []
    current = config.model_dump(mode="json")
    for section in (*_SECTIONS, "numerics"):
        stored = reader.manifest.config.get(section, {})
        for key, value in current[section].items():
            counts = key in _OTHER if section == "numerics" else key not in _NO_EFFECT
            if counts and key in stored:
                found.extend(_differences(key, stored[key], value))
    return found


def _differences(key: str, then: Any, now: Any) -> list[str]:
    """Return "key: then -> now" for each entry that differs, blocks entry by entry."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [text for name in {**then, **now} for text in _differences(name, then.get(name), now.get(name))]
    return [f"{key}: {then} -> {now}"] if then != now else []


def _model_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that decide the model's parameters and formula, with defaults that depend on others spelt out."""
    model = dict(config.get("model", {}))
    model["num_kv_heads"] = model.get("num_kv_heads") or model.get("num_attention_heads")
    numerics = config.get("numerics", {})
    return {**model, **{key: numerics[key] for key in _NUMERICS if key in numerics}}


def _other_model(reader: CheckpointReader, key: str, stored: Any, value: Any) -> Problem:
    return Problem(
        where=str(reader.folder),
        what=f"{key} = {value}",
        why=f"This is a checkpoint of another model: it was trained with {key} = {stored}.",
        fix=f"Set {key} to {stored}, or load a checkpoint of this model.",
    )


def require_shapes(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that names every weight which is missing, unexpected, or of another shape.

    shapes: canonical name -> full shape of the model about to be loaded.
    """
    stored = reader.shapes
    problems = []
    for name in sorted({*shapes, *stored}):
        here, there = shapes.get(name), stored.get(name)
        if here == there:
            continue
        if there is None:
            why = "The model has this weight, the checkpoint has not."
        elif here is None:
            why = "The checkpoint has this weight, the model has not."
        else:
            why = f"The model has {list(here)}, the checkpoint {list(there)}."
        problems.append(Problem(f"weight {name}", why, "Load a checkpoint of this model.", str(reader.folder)))
    if problems:
        raise CheckpointError(*problems)


def require_tokenizer(reader: CheckpointReader, name: str, fingerprint: str) -> None:
    """Raise CheckpointError where the checkpoint was trained with another tokenizer; one without a record passes."""
    stored = reader.manifest.tokenizer
    if stored.get("fingerprint") in (None, fingerprint):
        return
    raise CheckpointError(
        Problem(
            where=str(reader.folder),
            what=f"tokenizer {name} ({fingerprint[:12]})",
            why=f"The checkpoint was trained with {stored.get('name')} ({stored['fingerprint'][:12]}): the same token "
            "ids would mean other text.",
            fix=f"Use the tokenizer files in {reader.folder}/tokenizer.",
        )
    )
