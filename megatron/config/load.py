"""Files and command line -> Config: what `./deepy.py train.py 125M local_setup -d configs --set seed=7` means.

    config = load_config(["125M", "local_setup"], config_dir="configs", world_size=8)

The launcher counts processes from keys of the config itself, so the way is also open in two steps:
`read(...)` once, then `launcher_config(settings)`, then `resolve_settings(settings, world_size)`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron import logs
from megatron.config.classify import Overrides, apply_overrides, classify
from megatron.config.draft import Draft
from megatron.config.resolve import Resolution, resolve_settings
from megatron.config.schema.config import Config
from megatron.config.schema.run import LauncherConfig
from megatron.config.values import canonical_fields, validate
from megatron.config.yaml_reader import Setting, find_file, read_files
from megatron.errors import ConfigError, Problem

logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Settings:
    """The located values of all files and overrides, not yet resolved, and what was wrong with reading them.

    files: the files that were read, in order."""

    values: Mapping[str, Setting]
    problems: tuple[Problem, ...] = ()
    files: tuple[Path, ...] = ()

    def texts(self) -> dict[str, str]:
        """Return name -> text of the files, as they were written; the second of one name has its folder before it."""
        texts: dict[str, str] = {}
        for file in self.files:
            name = file.name if file.name not in texts else "_".join(file.absolute().parts[1:])
            texts[name] = file.read_text(encoding="utf-8")
        return texts

    def resolve(self, world_size: int | None = None, planning: bool = False) -> Resolution:
        """Return the Config and its notices; see `resolve_settings`. Raises ConfigError with all problems."""
        return resolve_settings(self.values, world_size, planning, list(self.problems))


def read(
    paths: Sequence[str | os.PathLike[str]],
    config_dir: str | os.PathLike[str] | None = None,
    overrides: Overrides | None = None,
) -> Settings:
    """Return the union of several files, with overrides in the place of what files say.

    paths: names or paths; `.yml` is optional. config_dir: `-d DIR`, where names are looked for first.
    overrides: texts `key=value`, or a mapping for flags of their own. Problems are kept, to be reported with the rest.
    """
    folder = Path(config_dir) if config_dir is not None else None
    found = [find_file(os.fspath(path), folder) for path in paths]
    files = tuple(file for file in found if isinstance(file, Path))
    problems = [problem for problem in found if isinstance(problem, Problem)]
    files, twice = _once(files)
    problems.extend(twice)
    values, wrong = read_files(files)
    problems.extend(wrong)
    problems.extend(apply_overrides(values, overrides))
    return Settings(values, tuple(problems), files)


def _once(files: Sequence[Path]) -> tuple[tuple[Path, ...], list[Problem]]:
    """Return the files without repetition, and a problem for each one that was given again."""
    known: dict[Path, Path] = {}
    problems = []
    for file in files:
        if known.setdefault(file.resolve(), file) is not file:
            problems.append(Problem(str(file), "the file is given twice.", "Name it once."))
    return tuple(known.values()), problems


def launcher_config(settings: Settings) -> LauncherConfig:
    """Return the launcher's section alone, which says how many processes the rest is resolved for.

    Raises ConfigError with the problems of that section and of reading the files."""
    classified = Draft(dict(settings.values))
    classify(classified)  # deepspeed_slurm and its like stand for keys of this section
    from_files = classified.settings
    draft = Draft(from_files, problems=list(settings.problems))
    given = {key: from_files[key].value for key in LauncherConfig.model_fields if key in from_files}
    section = validate(draft, LauncherConfig, canonical_fields(LauncherConfig, given))
    if not isinstance(section, LauncherConfig) or draft.problems:
        raise ConfigError(*draft.problems)
    return section


def load_config(
    paths: Sequence[str | os.PathLike[str]],
    config_dir: str | os.PathLike[str] | None = None,
    overrides: Overrides | None = None,
    world_size: int | None = None,
    planning: bool = False,
    announce: bool = True,
) -> Config:
    """Return the Config of files and overrides.

    world_size: processes of the run; None takes the files' word, or 1. planning: nothing will run (`--check`).
    announce: tell the notices (ignored keys and the like) to the log. Raises ConfigError with all problems at once.
    """
    resolution = read(paths, config_dir, overrides).resolve(world_size, planning)
    if announce:
        for notice in resolution.notices:
            logger.info(notice)
    return resolution.config
