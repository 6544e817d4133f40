"""From a command line's config files to a Config, in the two steps that the number of processes asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron import logs
from megatron.config.load import Settings, launcher_config, read
from megatron.config.places import located
from megatron.config.schema.config import Config
from megatron.config.schema.run import LauncherConfig
from megatron.errors import ConfigError, LaunchError, Problem
from megatron.launch.arguments import Arguments
from megatron.launch.command import Layout, find_layout

logger = logs.get_logger(__name__)


def read_settings(arguments: Arguments) -> Settings:
    """Return the located values of the command line's files and overrides."""
    return read(arguments.config_files, arguments.config_dir, arguments.overrides)


def read_launcher(settings: Settings) -> LauncherConfig:
    """Return the keys that say where ranks run. Raises ConfigError with the problems of all keys, not only theirs."""
    try:
        return launcher_config(settings)
    except ConfigError:
        settings.resolve(planning=True)
        raise


def read_layout(settings: Settings, launcher: LauncherConfig, environ: Mapping[str, str]) -> Layout:
    """Return where the ranks will run. Raises LaunchError where hosts or devices cannot be had, and ConfigError with
    that and the problems of all keys where the config is wrong as well."""
    try:
        return find_layout(launcher, environ)
    except LaunchError as error:
        hosts = located(error.problems, settings.values)
        wrong = _problems_of(settings)
        if wrong:
            raise ConfigError(*wrong, *hosts) from error
        raise LaunchError(*hosts) from error


def _problems_of(settings: Settings) -> Sequence[Problem]:
    try:
        settings.resolve(planning=True)
    except ConfigError as error:
        return error.problems
    return ()


def resolve_for(settings: Settings, world_size: int | None, planning: bool = False) -> Config:
    """Return the Config for `world_size` processes, and tell its notices.

    world_size: None with planning=True where one process uses a model of any layout, as in generation.
    Raises ConfigError with all problems at once."""
    resolution = settings.resolve(world_size, planning)
    for notice in resolution.notices:
        logger.info(notice)
    return resolution.config
