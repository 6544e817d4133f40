"""The first pass over the keys: aliases take their proper name, ignored ones are announced, others refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.config import keys
from megatron.config.draft import Draft, show
from megatron.config.neox_keys import ALIASES, IGNORED, IMPLIED, REFUSED
from megatron.config.schema.deepspeed import DeepspeedConfig
from megatron.config.yaml_reader import Setting, canonical_key, parse_value
from megatron.errors import Problem

Overrides = Mapping[str, Any] | Sequence[str]


def apply_overrides(settings: dict[str, Setting], overrides: Overrides | None) -> list[Problem]:
    """Put command-line values in the place of those from files, in place; return what is wrong with them.

    overrides: texts `key=value` (the value is YAML, the key may be dotted: `optimizer.params.lr=3e-4`), or a mapping
    of keys to values for flags of their own such as --hostfile.
    """
    if overrides is None:
        return []
    problems: list[Problem] = []
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _put(settings, canonical_key(key), Setting(value, f"--{key}"), problems)
        return problems
    for text in overrides:
        key, equals, value_text = text.partition("=")
        where = f"--set {text}"
        if not equals or not key.strip():
            problems.append(Problem(text, "an override is a key and a value.", "Write --set key=value", "--set"))
            continue
        if keys.is_secret(key):
            where = f"--set {key}=..."
        _put(settings, canonical_key(key), parse_value(value_text, where), problems)
    return problems


def _put(settings: dict[str, Setting], key: str, setting: Setting, problems: list[Problem]) -> None:
    top, _, path = ALIASES.get(key, key).partition(".")
    if not path:
        settings[top] = setting
        return
    old = settings.get(top, Setting(None, setting.where))
    block = copy.deepcopy(old.value) if old.value is not None else {}
    if not isinstance(block, dict):
        problems.append(Problem(key, f"{top} is not a block.", f"Remove {top} from the file.", setting.where))
        return
    inner = {name: place for name, place in old.inner.items() if not f"{name}.".startswith(f"{path}.")}
    _set_entry(block, path, setting.value)
    names = path.split(".")
    created = {".".join(names[:count]): setting.where for count in range(1, len(names))}
    settings[top] = Setting(block, old.where, {**created, **inner, path: setting.where})


def _set_entry(block: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        child = block.get(name)
        block[name] = child if isinstance(child, dict) else {}
        block = block[name]
    block[last] = value


def _entry(block: Any, path: str) -> tuple[bool, Any]:
    """Return (whether the entry exists, its value) of a dotted path in nested dicts."""
    for name in path.split("."):
        if not isinstance(block, dict) or name not in block:
            return False, None
        block = block[name]
    return True, block


def classify(draft: Draft) -> None:
    """Reduce `draft.settings` to used keys, in place, noting problems and notices.

    Ignored and refused keys, aliases and keys that stand for others leave the settings."""
    for key in list(draft.settings):
        setting, status = draft.settings[key], keys.status(key)
        if keys.is_secret(key):
            _refuse_secret(draft, key)
        elif status == "unknown":
            draft.problems.append(_unknown(key, setting))
        elif status == "refused" and not keys.is_neutral(key, setting.value):
            refusal = REFUSED[key]
            draft.problems.append(draft.problem(key, setting.value, refusal.reason, refusal.fix))
        elif status == "ignored":
            place = f"{setting.where}: " if setting.where else ""
            draft.notices.append(f"{place}{key} is ignored: {IGNORED[key]}.")
        elif status == "used":
            _find_secrets(draft, key, setting.value)
            continue
        elif status == "alias":
            continue
        del draft.settings[key]
    _lift(draft)
    _rename(draft)
    _imply(draft)


def _unknown(key: str, setting: Setting) -> Problem:
    near = keys.near_names(key)
    fix = near or "docs/configuration.md lists every key."
    return Problem(f"{key} = {show(setting.value)}", "there is no such key.", fix, setting.where)


def _refuse_secret(draft: Draft, key: str) -> None:
    draft.problems.append(
        Problem(
            key,
            "a secret does not belong into a file or a command line: both are saved with the run.",
            "Export it in the environment (WANDB_API_KEY, COMET_API_KEY), and remove the key.",
            draft.where(key),
        )
    )


def _find_secrets(draft: Draft, path: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, child in value.items():
            if keys.is_secret(name):
                _refuse_secret(draft, f"{path}.{name}")
            _find_secrets(draft, f"{path}.{name}", child)


def _at(draft: Draft, key: str) -> str:
    where = draft.where(key)
    return f" at {where}" if where else ""


def _lift(draft: Draft) -> None:
    """Move what stands in deepspeed_extra_args, and is a key of DeepSpeed's section, to that key if it is not set."""
    setting = draft.settings.get("deepspeed_extra_args")
    if setting is None or not isinstance(setting.value, dict):
        return
    own = {name for name in setting.value if name in DeepspeedConfig.model_fields and name not in draft.settings}
    for name in own:
        draft.settings[name] = Setting(setting.value[name], setting.inner.get(name, setting.where))
    kept = {name: value for name, value in setting.value.items() if name not in own}
    draft.settings["deepspeed_extra_args"] = Setting(kept or None, setting.where, setting.inner)


def _rename(draft: Draft) -> None:
    """Move each alias to what it names; two different values for one thing are a problem."""
    for alias in [key for key in draft.settings if key in ALIASES]:
        setting = draft.settings.pop(alias)
        if setting.value is None:
            continue
        top, _, path = ALIASES[alias].partition(".")
        old = draft.settings.get(top)
        exists, value = (old is not None, old.value if old else None) if not path else _entry(old and old.value, path)
        if exists and value is not None and value != setting.value:
            draft.problems.append(
                Problem(
                    f"{alias} = {show(setting.value)}",
                    f"it is another name of {ALIASES[alias]}, which is {show(value)}{_at(draft, ALIASES[alias])}.",
                    f"Keep {ALIASES[alias]} alone.",
                    setting.where,
                )
            )
        else:
            _put(draft.settings, alias, setting, draft.problems)


def _imply(draft: Draft) -> None:
    """Replace each true switch by the keys it stands for, unless they are set."""
    for switch in [key for key in draft.settings if key in IMPLIED]:
        setting = draft.settings.pop(switch)
        if not (setting.value is None or isinstance(setting.value, bool)):
            draft.problems.append(Problem(f"{switch} = {show(setting.value)}", "it must be true or false.",
                                          f"Write {switch}: true or {switch}: false", setting.where))  # fmt: skip
        elif setting.value is True:
            for key, value in IMPLIED[switch].items():
                draft.settings.setdefault(key, Setting(value, setting.where))
