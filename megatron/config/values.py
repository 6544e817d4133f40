"""Canonical values by the types of the schema, and pydantic's errors as problems that say what to write."""

from __future__ import annotations

import math
import types
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron.config.draft import Draft
from megatron.config.yaml_reader import parse_scalar
from megatron.errors import Problem

SPELLINGS: dict[str, dict[str, str]] = {
    "precision": {
        "bfloat16": "bf16",
        "float16": "fp16",
        "half": "fp16",
        "float32": "fp32",
        "float": "fp32",
        "float8": "fp8",
    },
    "communication_data_type": {"bfloat16": "bf16", "bfp16": "bf16", "float16": "fp16", "float32": "fp32"},
    "grad_accum_dtype": {"bfloat16": "bf16", "bfp16": "bf16", "float16": "fp16", "float32": "fp32"},
    "activation": {"gelu_erf": "gelu"},
}

EXAMPLES = {
    "optimizer.params": "optimizer.params: {lr: 6.0e-4, betas: [0.9, 0.95]}",
    "optimizer.params.lr": "optimizer.params.lr: 6.0e-4",
}

_TE_NORM = "TransformerEngine layers are not built in this version. Write"
REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("norm", "te_layernorm"): f"{_TE_NORM} norm: layernorm, which computes the same function.",
    ("norm", "te_rmsnorm"): f"{_TE_NORM} norm: rmsnorm, which computes the same function.",
    ("data_impl", "cached"): "GPT-NeoX cannot train on it either; make mmap files with tools/preprocess_data.py.",
    **{
        (
            "type",
            name,
        ): "its compressed sums differ from the exact ones, and keep a state that checkpoints cannot hold. "
        "Write optimizer.type: adam"
        for name in ("onebitadam", "zerooneadam", "onebitlamb")
    },
    ("text_gen_type", "precompute"): "reference log-probabilities (DPO, KTO) are not built in this version.",
}


def choices(annotation: Any) -> tuple[str, ...]:
    """Return what an annotation's Literal allows, as text of YAML, or () where it has none."""
    return tuple(_literals(annotation))


def _literals(annotation: Any) -> dict[str, Any]:
    """Return the values that an annotation's Literal allows by their text."""
    values = [value for part in parts(annotation) if get_origin(part) is Literal for value in get_args(part)]
    return {str(value).lower() if isinstance(value, bool) else str(value): value for value in values}


def parts(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _allows(annotation: Any, wanted: Any) -> bool:
    return any(part is wanted or get_origin(part) is wanted for part in parts(annotation))


def allows_none(annotation: Any) -> bool:
    """Return whether null is a value of its own for a field, and not just "as if it were not set"."""
    return _allows(annotation, type(None)) or annotation is Any


def canonical(name: str, annotation: Any, value: Any) -> Any:
    """Return a value in the form that is stored: Literals in their own spelling, whole floats as integers.

    Anything that does not fit is returned as it is; validation says what is wrong with it."""
    if isinstance(value, str) and choices(annotation):
        lowered = SPELLINGS.get(name, {}).get(value.strip().lower(), value.strip().lower())
        return next((choice for text, choice in _literals(annotation).items() if text.lower() == lowered), value)
    if isinstance(value, float) and value.is_integer() and _allows(annotation, int):
        return int(value)
    if isinstance(value, list):
        elements = [get_args(part)[0] for part in parts(annotation) if get_origin(part) is list]
        return [canonical(name, elements[0], item) for item in value] if elements else value
    return value


def canonical_fields(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a model's fields in canonical form; null falls back to the default where it says nothing."""
    result = {}
    for name, value in values.items():
        info = model.model_fields.get(name)
        if info is None:
            result[name] = value
            continue
        if value == "" and allows_none(info.annotation):
            value = None  # an empty path or name is no path, and no name
        if value is None and not allows_none(info.annotation):
            continue
        result[name] = canonical(name, info.annotation, value)
    return result


def validate(draft: Draft, model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> BaseModel | None:
    """Return the validated model, or None after noting every error in the draft.

    values: canonical values of its fields. prefix: "optimizer.params." where the model is a block of a key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = prefix + ".".join(str(part) for part in detail["loc"])
            why, fix = _explain(model, prefix, detail)
            if detail["type"] == "missing":
                draft.problems.append(Problem(path, why, fix, draft.where(path) if prefix else ""))
                draft.wrong.add(path.partition(".")[0])
            else:
                draft.refuse(path, detail["input"], why, fix)
        return None


_NAMES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge", "{} or more"),
    "greater_than": ("more than", "gt", "more than {}"),
    "less_than_equal": ("at most", "le", "{} or less"),
    "less_than": ("less than", "lt", "less than {}"),
}


def _field_at(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[type[BaseModel], FieldInfo | None]:
    """Return the innermost model that a location of pydantic's lies in, and the field it names there."""
    info: FieldInfo | None = None
    for name in location:
        info = model.model_fields.get(str(name))
        inner = [part for part in parts(info.annotation) if hasattr(part, "model_fields")] if info else []
        if name == location[-1] or not inner:
            break
        model = inner[0]
    return model, info


def _explain(model: type[BaseModel], prefix: str, detail: Any) -> tuple[str, str]:
    """Return (why, fix) of one error of pydantic."""
    kind, value, location = detail["type"], detail["input"], detail["loc"]
    model, info = _field_at(model, location)
    path = prefix + ".".join(str(part) for part in location if isinstance(part, str))
    name = path.rpartition(".")[2]
    if kind == "missing":
        unit = (info.json_schema_extra or {}).get("unit") if info and isinstance(info.json_schema_extra, dict) else None
        example = EXAMPLES.get(path, f"{path}: <{unit or 'value'}>")
        return f"it must be set. {(info.description if info else None) or ''}".rstrip(), f"Add {example}"
    if kind == "extra_forbidden":
        near = get_close_matches(name, model.model_fields, n=3)
        known = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(model.model_fields)}."
        return "there is no such entry.", known
    if kind == "literal_error":
        return _explain_choice(path, name, value, choices(info.annotation) if info else ())
    if kind in _BOUNDS:
        words, name, wanted = _BOUNDS[kind]
        bound = f"{detail['ctx'][name]:g}"
        return f"it must be {words} {bound}.", f"Set {path} to {wanted.format(bound)}."
    if kind == "finite_number":
        return "it must be a finite number.", f"Set {path} to a number."
    return f"it must be {_NAMES.get(kind, 'of another type')}.", _type_fix(path, kind, value)


def _explain_choice(path: str, name: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, str]:
    reason = REFUSED_VALUES.get((name, str(value).lower()))
    if reason:
        return "it cannot be used.", reason
    near = get_close_matches(str(value).lower(), allowed, n=1)
    listed = ", ".join(allowed)
    return f"it is none of {listed}.", f"Write {path}: {near[0]}" if near else f"Choose one of them for {path}."


def _type_fix(path: str, kind: str, value: Any) -> str:
    """Return the fix of a value of the wrong type, in a form to copy where one can be guessed."""
    plain = parse_scalar(value) if isinstance(value, str) else value
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type") and not isinstance(plain, str):
        return f"Write it without quotes: {path}: {value}"
    if isinstance(value, bool) and kind in ("int_type", "float_type"):
        return f"Write a number: {path}: {int(value)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if kind == "int_type":
            return f"Write {path}: {round(value)}"
        if kind == "bool_type":
            return f"Write {path}: {'true' if value else 'false'}"
        if kind == "string_type":
            return f'Write it with quotes: {path}: "{value}"'
    if kind == "list_type" and isinstance(value, str):
        return f"Write {path}: [{', '.join(part.strip() for part in value.split(','))}]"
    return f"Write {_NAMES.get(kind, 'a value of the right type')} for {path}."
