"""YAML and JSON files as located values: every key knows the file and line that set it.

Three things differ from plain PyYAML, because each has cost users days: `1e-4` and `5e8` are numbers, a key
that is given twice is an error that names both places, and dates, octals and base-60 numbers stay strings.

    settings, problems = read_files([Path("configs/125M.yml")])
    settings["hidden_size"]  # Setting(value=768, where="configs/125M.yml:11", inner={})
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import Problem

SUFFIXES = (".yml", ".yaml", ".json")
_DEEPEST = 30

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_TRUE = re.compile(r"(?:true|True|TRUE|yes|Yes|YES|on|On|ON)\Z")
_FALSE = re.compile(r"(?:false|False|FALSE|no|No|NO|off|Off|OFF)\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z")
_HEX = re.compile(r"0x[0-9a-fA-F_]+\Z")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)\Z")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z")


@dataclass(frozen=True)
class Setting:
    """One value and the place that set it.

    value: as plain Python.
    where: `file:line`, `--set key=value`, or "" for a value that came from Python.
    inner: the places of nested keys, by their path below this one: {"params.lr": "configs/a.yml:14"}.
    """

    value: Any
    where: str = ""
    inner: Mapping[str, str] = field(default_factory=dict)


class _NodeError(Exception):
    """A node that cannot stand for a configuration value."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def canonical_key(name: str) -> str:
    """Return a key as the schema spells it: `-` equals `_`."""
    return name.strip().replace("-", "_")


def parse_scalar(text: str) -> Any:
    """Return the value of an unquoted scalar: null, bool, int, float or the text itself."""
    if _NULL.match(text):
        return None
    if _TRUE.match(text):
        return True
    if _FALSE.match(text):
        return False
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _HEX.match(text):
        return int(text.replace("_", ""), 16)
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    if _INFINITE.match(text):
        return float(text.replace(".", ""))
    return text


def parse_value(text: str, where: str) -> Setting:
    """Return the value of a piece of YAML text such as an override's right side; raises nothing: text that is no
    YAML is taken as a string."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return Setting(None, where)
        inner: dict[str, str] = {}
        value = _construct(node, "", lambda _: where, inner)
    except (yaml.YAMLError, _NodeError):
        return Setting(text, where)
    return Setting(value, where, inner)


def _pairs(node: Any, place: Any) -> Iterable[tuple[Any, Any]]:
    """Yield the key and value nodes of a mapping, with `<<: *anchor` replaced by what it refers to."""
    own = {child.value for child, _ in node.value if child.tag != "tag:yaml.org,2002:merge"}
    for key, value in node.value:
        if key.tag != "tag:yaml.org,2002:merge":
            yield key, value
            continue
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise _NodeError(
                    Problem("<<", "it merges mappings only.", "Write `<<: *name` of a mapping.", place(value))
                )
            for pair in _pairs(source, place):
                if pair[0].value not in own:
                    own.add(pair[0].value)
                    yield pair


def _construct(node: Any, path: str, place: Any, inner: dict[str, str]) -> Any:
    """Return the plain value of a YAML node and note the place of each nested key in `inner`."""
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise _NodeError(Problem(node.tag, "tags have no meaning here.", "Write the plain value.", place(node)))
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else parse_scalar(node.value)
    if path.count(".") > _DEEPEST:
        raise _NodeError(Problem(path[:40], "it is nested without end.", "Write the values out.", place(node)))
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, f"{path}.{index}", place, inner) for index, child in enumerate(node.value)]
    result: dict[str, Any] = {}
    lines: dict[str, str] = {}
    for key_node, value_node in _pairs(node, place):
        key = str(key_node.value)
        if key in result:
            raise _NodeError(_duplicate(key, lines[key], place(key_node)))
        lines[key] = place(key_node)
        inner_path = f"{path}.{key}" if path else key
        inner[inner_path] = lines[key]
        result[key] = _construct(value_node, inner_path, place, inner)
    return result


def _duplicate(key: str, first: str, second: str) -> Problem:
    return Problem(
        what=key,
        why=f"it is already set at {first}.",
        fix="Remove one of the two; a key has one place (`--set key=value` on the command line overrides a file).",
        where=second,
    )


def read_text(text: str, name: str) -> tuple[dict[str, Setting], list[Problem]]:
    """Return the located values of a YAML or JSON text and all problems found.

    name: the file's name, for the places. Keys are in the schema's spelling.
    """

    def place(node: Any) -> str:
        return f"{name}:{node.start_mark.line + 1}"

    if name.endswith(".json"):
        text = text.replace("\t", " ")  # the one thing that JSON allows between tokens and YAML does not
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        why = f"{error.problem or error.context}."
        fix = 'Write one `key: value` per line, or `{"key": value, ...}`.'
        if mark and "\t" in text.splitlines()[min(mark.line, text.count("\n"))]:
            why, fix = (
                f"{error.problem or error.context}, and the line has a tab.",
                "Indent with spaces; YAML has no tabs.",
            )
        return {}, [Problem("not YAML", why, fix, where)]
    except yaml.YAMLError as error:
        return {}, [Problem("not YAML", f"{error}.", "Save the file as UTF-8 text.", name)]
    if root is None:
        return {}, []
    if not isinstance(root, yaml.MappingNode):
        return {}, [Problem("no keys", "the file is not a mapping.", "Write one `key: value` per line.", place(root))]
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    try:
        pairs = list(_pairs(root, place))
    except _NodeError as error:
        return {}, [error.problem]
    for key_node, value_node in pairs:
        key = canonical_key(str(key_node.value))
        if key in settings:
            problems.append(_duplicate(str(key_node.value), settings[key].where, place(key_node)))
            continue
        inner: dict[str, str] = {}
        try:
            value = _construct(value_node, "", place, inner)
        except _NodeError as error:
            problems.append(error.problem)
            continue
        settings[key] = Setting(value, place(key_node), inner)
    return settings, problems


def find_file(name: str, folder: Path | None = None) -> Path | Problem:
    """Return the file that a name on the command line means, or a Problem that lists near names.

    name: a path; `.yml` is added where it ends in none of .yml, .yaml and .json.
    folder: tried first, as `folder/name`; None tries the name alone.
    """
    named = name if name.endswith(SUFFIXES) else f"{name}.yml"
    candidates = [folder / named, Path(named)] if folder else [Path(named)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    parent = candidates[0].parent
    present = sorted(file.name for file in parent.iterdir() if file.suffix in SUFFIXES) if parent.is_dir() else []
    near = get_close_matches(candidates[0].name, present, n=4, cutoff=0.5) or present[:12]
    if near:
        fix = f"In {parent} there are: {', '.join(near)}."
    elif parent.is_dir():
        fix = f"The folder {parent} holds no .yml, .yaml or .json file."
    else:
        fix = f"The folder {parent} does not exist; give another with -d DIR."
    tried = " and ".join(str(candidate) for candidate in candidates)
    return Problem(what=name, why=f"no such file: {tried}.", fix=fix)


def read_files(paths: Iterable[Path]) -> tuple[dict[str, Setting], list[Problem]]:
    """Return the union of several files' values, and all problems, duplicates across files among them."""
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(str(path), f"it cannot be read: {error}.", "Give a readable UTF-8 file."))
            continue
        values, found = read_text(text, str(path))
        problems.extend(found)
        for key, value in values.items():
            if key in settings:
                problems.append(_duplicate(key, settings[key].where, value.where))
            else:
                settings[key] = value
    return settings, problems
