"""Where a setting was made, for problems that are only found when the run is under way, or by looking at files.

A resolved Config has values without places. The files it was read from travel with it, so that a late problem such as
`data_path = nope` can still name its file and line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.config.draft import show
from megatron.config.yaml_reader import Setting, read_text
from megatron.errors import DeepyError, Problem

_KEY = re.compile(r"([a-z][a-z0-9_]*)(?: = |$)")


def located(problems: Iterable[Problem], settings: Mapping[str, Setting]) -> list[Problem]:
    """Return the problems, those of a key that `settings` holds with the place of that key."""
    return [problem if problem.where else _located(problem, settings) for problem in problems]


def _located(problem: Problem, settings: Mapping[str, Setting]) -> Problem:
    match = _KEY.match(problem.what)
    setting = settings.get(match[1]) if match else None
    return dataclasses.replace(problem, where=setting.where) if setting is not None else problem


def settings_of(files: Mapping[str, str], flat: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings that stand in some files' texts.

    files: name -> text. flat: the resolved keys; what another value replaced, as `--set` does, is left out.
    """
    found: dict[str, Setting] = {}
    for name, text in files.items():
        found.update(read_text(text, name)[0])
    return {key: setting for key, setting in found.items() if key in flat and show(flat[key]) == show(setting.value)}


def locate_error(error: DeepyError, files: Mapping[str, str], flat: Mapping[str, Any]) -> DeepyError:
    """Return the error with the places of the keys that its problems name; its kind and exit code stay."""
    problems = located(error.problems, settings_of(files, flat))
    if problems == list(error.problems):
        return error
    result = type(error)(*problems)
    result.exit_code = error.exit_code
    return result.with_traceback(error.__traceback__)
