"""The one flat name space: what every key means, and to which section it belongs.

A key is *used* (a field of the schema), an *alias* of one, *ignored* with a reason that is shown, or *refused*
unless its value asks for nothing.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

from pydantic.fields import FieldInfo

from megatron.config.neox_keys import ALIASES, IGNORED, IMPLIED, REFUSED, RENAMED
from megatron.config.schema.base import Section
from megatron.config.schema.config import Config

Status = Literal["used", "alias", "ignored", "refused", "unknown"]

PLANNING = "global_num_gpus"
"""The number of GPUs that a config is planned for; read before resolution, so it is no field of a section."""

_SECRET_ENDINGS = ("api_key", "apikey", "password", "secret", "access_key", "_token", "secret_key")


@cache
def sections() -> dict[str, type[Section]]:
    """Return each section's class by its name in Config, in order."""
    found = ((name, field.annotation) for name, field in Config.model_fields.items())
    return {name: kind for name, kind in found if isinstance(kind, type) and issubclass(kind, Section)}


@cache
def fields() -> dict[str, tuple[str, FieldInfo]]:
    """Return the section's name and the pydantic field of each used key."""
    return {key: (name, info) for name, section in sections().items() for key, info in section.model_fields.items()}


def status(key: str) -> Status:
    """Return how a key (in the schema's spelling) is treated."""
    if key in fields() or key == PLANNING:
        return "used"
    if key in ALIASES or key in IMPLIED:
        return "alias"
    if key in IGNORED:
        return "ignored"
    return "refused" if key in REFUSED else "unknown"


def is_neutral(key: str, value: Any) -> bool:
    """Return whether a refused key's value asks for nothing: GPT-NeoX's default, null, empty or switched off."""
    neutral = REFUSED[key].neutral
    if value is None or value == {} or value == []:
        return True
    if isinstance(value, dict) and value.get("enabled") is False:
        return True
    if isinstance(value, str) and isinstance(neutral, str):
        return value.lower() == neutral.lower()
    return bool(value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


def near_names(key: str, names: list[str] | None = None) -> str:
    """Return a sentence with the names that a misspelt key may mean; "" where none is near."""
    if names is None and key in RENAMED:
        return f"The key is {RENAMED[key]}."
    known = names if names is not None else [*fields(), *ALIASES, *IMPLIED, PLANNING]
    near = get_close_matches(key, known, n=2, cutoff=0.85) or get_close_matches(key, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def is_secret(key: str) -> bool:
    """Return whether a key's name says that its value must never be written anywhere."""
    return str(key).lower().replace("-", "_").endswith(_SECRET_ENDINGS)


def default(key: str) -> Any:
    """Return the value of a used key that no file sets; None where it must be set."""
    return fields()[key][1].get_default(call_default_factory=True) if not fields()[key][1].is_required() else None
