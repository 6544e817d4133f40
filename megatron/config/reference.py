"""The reference of all keys, generated from the schema: docs/configuration.md and a JSON schema for editors; and
docs/parallelism.md from the table of combinations.

python -m megatron.config.reference          # writes all three
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron.config import keys, parallelism_page
from megatron.config.blocks import BLOCKS
from megatron.config.draft import show
from megatron.config.neox_keys import ALIASES, IGNORED, IMPLIED, OWN_KEYS, REFUSED
from megatron.config.schema.base import Section
from megatron.config.values import choices, parts

_SIGNS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
_JSON_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_NAMES: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "string", dict: "mapping"}
_JSON_TYPES: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string", dict: "object"}

_OPENING = """\
# Configuration

Generated from `megatron/config/schema/` by `python -m megatron.config.reference`; do not edit.

A run is configured by flat keys in one or more YAML or JSON files, merged in any order:
`./deepy.py train.py configs/125M.yml configs/local_setup.yml`. `-` equals `_` in keys, `.yml` may be left out,
`-d DIR` names the folder, and `1e-4` is a number. A key has one place: given twice, in one file or in two, it is an
error. On the command line `--set key=value` overrides a file, with dots for entries of a block
(`--set optimizer.params.lr=3e-4`). Names such as `rotary` are matched without regard to case. `null` means "as if
unset". Add `--check` to see what a config means without running it. Keys marked † are new; all others have the
name and meaning that they have in GPT-NeoX.

For completion and checking in an editor, put this line at the top of a YAML file:
`# yaml-language-server: $schema=<path to>/docs/config.schema.json`"""


def kind(annotation: Any) -> str:
    """Return a field's type in words; choices are listed."""
    allowed = choices(annotation)
    if allowed:
        return ", ".join(f"`{choice}`" for choice in allowed)
    for part in parts(annotation):
        if get_origin(part) is list:
            element = get_args(part)[0]
            return f"list of {_NAMES[element]}s" if element in (int, float, str) else "list"
        if part is not types.NoneType:
            return _NAMES.get(get_origin(part) or part, "mapping")
    return "value"


def unit(info: FieldInfo) -> str:
    """Return what a field's number counts, or "" for what is not a number."""
    extra = info.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def bounds(info: FieldInfo) -> dict[str, Any]:
    """Return a field's range by pydantic's names: {"ge": 1}."""
    return {
        name: getattr(constraint, name)
        for constraint in info.metadata
        for name in _SIGNS
        if getattr(constraint, name, None) is not None
    }


def _row(key: str, info: FieldInfo) -> str:
    default = "required" if info.is_required() else f"`{show(info.get_default(call_default_factory=True))}`"
    if key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        default = "derived"
    allowed = " ".join(_SIGNS[name].format(f"{value:g}") for name, value in bounds(info).items())
    measure = ", ".join(part for part in (unit(info).replace("none", ""), allowed) if part)
    text = (info.description or "").replace("|", "\\|").replace("\n", " ")
    mark = " †" if key in OWN_KEYS else ""
    return f"| `{key}`{mark} | {kind(info.annotation)} | {default} | {measure} | {text} |"


def _section(name: str, section: type[Section]) -> Iterator[str]:
    title = (section.__doc__ or "").split(":")[0].strip().rstrip(".")
    yield f"\n## {name}: {title[0].lower()}{title[1:]}\n"
    yield "| key | type | default | unit and range | meaning |"
    yield "|---|---|---|---|---|"
    for key, info in section.model_fields.items():
        yield _row(key, info)


def _block_tables() -> Iterator[str]:
    yield "\n## Entries of the blocks\n"
    yield "Names and meanings are DeepSpeed's; the defaults are what DeepSpeed is told where an entry is not set. Only"
    yield "`spike_guard` is our own."
    for name, block in BLOCKS.items():
        yield f"\n### {name}\n"
        if any(info.description for info in block.model_fields.values()):
            yield "| entry | type | default | unit and range | meaning |\n|---|---|---|---|---|"
            yield from (_row(entry, info) for entry, info in block.model_fields.items())
            continue
        yield "| entry | type | default | range |\n|---|---|---|---|"
        for entry, info in block.model_fields.items():
            default = "required" if info.is_required() else f"`{show(info.get_default(call_default_factory=True))}`"
            allowed = " ".join(_SIGNS[sign].format(f"{value:g}") for sign, value in bounds(info).items())
            yield f"| `{entry}` | {kind(info.annotation)} | {default} | {allowed} |"


def _neox_tables() -> Iterator[str]:
    yield "\n## GPT-NeoX keys with another name\n"
    yield "| key | stands for |\n|---|---|"
    for key, target in ALIASES.items():
        yield f"| `{key}` | `{target}` |"
    for key, targets in IMPLIED.items():
        meaning = ", ".join(f"`{name}: {show(value)}`" for name, value in targets.items())
        yield f"| `{key}: true` | {meaning} |"
    yield f"| `{keys.PLANNING}` | the number of GPUs that `--check` plans for; a run counts its own processes |"
    yield "\n## GPT-NeoX keys that are ignored\n"
    yield "They may stay in a file; each start says so.\n"
    yield "| key | why |\n|---|---|"
    for key, reason in sorted(IGNORED.items()):
        yield f"| `{key}` | {reason} |"
    yield "\n## GPT-NeoX keys that are refused\n"
    yield "Accepted with the value that asks for nothing, null or `{enabled: false}`; any other value is an error.\n"
    yield "| key | accepted | why | instead |\n|---|---|---|---|"
    for key, refusal in sorted(REFUSED.items()):
        yield f"| `{key}` | `{show(refusal.neutral)}` | {refusal.reason} | {refusal.fix} |"


def markdown() -> str:
    """Return the text of docs/configuration.md."""
    lines = [_OPENING]
    for name, section in keys.sections().items():
        lines.extend(_section(name, section))
    lines.extend(_block_tables())
    lines.extend(_neox_tables())
    return "\n".join(lines) + "\n"


def _json_type(annotation: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for part in parts(annotation):
        origin = get_origin(part) or part
        if part is types.NoneType:
            found.append({"type": "null"})
        elif choices(part):
            found.append({"enum": list(get_args(part))})
        elif origin is list:
            found.append({"type": "array", "items": _json_type(get_args(part)[0])})
        elif origin in _JSON_TYPES:
            found.append({"type": _JSON_TYPES[origin]})
        elif hasattr(part, "model_fields"):
            found.append(_json_block(part))
        else:
            found.append({})
    return found[0] if len(found) == 1 else {"anyOf": found}


def _json_field(info: FieldInfo) -> dict[str, Any]:
    entry = _json_type(info.annotation)
    entry |= {_JSON_BOUNDS[name]: value for name, value in bounds(info).items()}
    if info.description:
        measure = unit(info)
        entry["description"] = f"{info.description} ({measure})" if measure not in ("", "none") else info.description
    if not info.is_required():
        entry["default"] = info.get_default(call_default_factory=True)
    return entry


def _json_block(block: Any) -> dict[str, Any]:
    properties = {name: _json_field(info) for name, info in block.model_fields.items()}
    closed = block.model_config.get("extra") == "forbid"
    return {"type": "object", "properties": properties, "additionalProperties": not closed}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of one flat file; required keys may stand in another file, so none is required."""
    properties: dict[str, Any] = {}
    for key, (_, info) in keys.fields().items():
        properties[key] = _json_field(info)
        if key in BLOCKS:
            block = {**_json_block(BLOCKS[key]), "description": info.description}
            properties[key] = {"anyOf": [block, {"type": "null"}], "description": info.description}
    for key, target in ALIASES.items():
        properties[key] = {"description": f"Another name of {target}.", "deprecated": True}
    for key in IMPLIED:
        properties[key] = {"type": "boolean", "description": "Stands for keys of the launcher.", "deprecated": True}
    for key, reason in IGNORED.items():
        properties[key] = {"description": f"Ignored: {reason}.", "deprecated": True}
    for key, refusal in REFUSED.items():
        properties[key] = {"description": f"{refusal.reason} {refusal.fix}", "deprecated": True}
    properties[keys.PLANNING] = {"type": "integer", "minimum": 1, "description": "GPUs that --check plans for."}
    dashed = {key.replace("_", "-"): {"$ref": f"#/properties/{key}"} for key in properties if "_" in key}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "deepy configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, **dashed},
    }


def pages() -> dict[str, str]:
    """Return the generated files by their path from the repository's root."""
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {
        "docs/configuration.md": markdown(),
        "docs/config.schema.json": schema,
        "docs/parallelism.md": parallelism_page.markdown(),
    }


def main() -> None:
    """Write the generated files."""
    root = Path(__file__).resolve().parents[2]
    for name, text in pages().items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
