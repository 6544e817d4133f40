"""From a command line's config files to a Config, in the two steps that the number of processes asks for."""

from __future__ import annotations

from megatron import logs
from megatron.config.load import Settings, launcher_config, read
from megatron.config.schema.config import Config
from megatron.config.schema.run import LauncherConfig
from megatron.errors import ConfigError
from megatron.launch.arguments import Arguments

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


def resolve_for(settings: Settings, world_size: int | None, planning: bool = False) -> Config:
    """Return the Config for `world_size` processes, and tell its notices.

    world_size: None with planning=True where one process uses a model of any layout, as in generation.
    Raises ConfigError with all problems at once."""
    resolution = settings.resolve(world_size, planning)
    for notice in resolution.notices:
        logger.info(notice)
    return resolution.config
