"""A configuration on its way: values with their places, and everything found wrong so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.yaml_reader import Setting
from megatron.errors import Problem


class UnavailableError(Exception):
    """A value that is itself wrong or missing, so that nothing more can be said about what depends on it."""


def show(value: Any) -> str:
    """Return a value as a YAML file would hold it, shortened to one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def either(values: Sequence[Any]) -> str:
    """Return values as a person lists what may be chosen: "1, 2 or 4"."""
    texts = [str(value) for value in values]
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


@dataclass
class Draft:
    """The state of one resolution; only the functions of `resolve.py` write to it.

    values: the value of each used key; after `resolve` has filled in defaults, of every key that is not wrong.
    settings: the values as they were given, with their places.
    notices: what a person should know though nothing is wrong.
    """

    settings: dict[str, Setting]
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)

    def where(self, key: str) -> str:
        """Return the place of a key, dotted for an entry of a block; the nearest known place above it."""
        top, _, path = key.partition(".")
        setting = self.settings.get(top)
        if setting is None:
            return ""
        while path:
            if path in setting.inner:
                return setting.inner[path]
            path = path.rpartition(".")[0]
        return setting.where

    def problem(self, key: str, value: Any, why: str, fix: str) -> Problem:
        """Return a problem of a key's value, at its place."""
        return Problem(f"{key} = {show(value)}", why, fix, self.where(key))

    def refuse(self, key: str, value: Any, why: str, fix: str) -> None:
        """Note a problem, and that what depends on the key cannot be judged."""
        self.problems.append(self.problem(key, value, why, fix))
        self.wrong.add(key.partition(".")[0])

    def given(self, key: str) -> bool:
        """Return whether a file or the command line set the key to something other than null."""
        return key in self.settings and self.settings[key].value is not None

    def __getattr__(self, key: str) -> Any:
        """Return a key's value; raises UnavailableError where it is wrong or missing."""
        if key.startswith("__") or key in self.wrong or key not in self.values:
            raise UnavailableError(key)
        return self.values[key]
