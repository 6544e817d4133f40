"""`runs/<run_name>/`: metrics.jsonl, config.yml, loss.png, and what the sinks keep there."""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from megatron.config.keys import is_secret
from megatron.config.schema.config import Config
from megatron.errors import DeepyError, Problem


def run_name(config: Config) -> str:
    """Return the name of the run: run_name, else wandb_run_name, else the date and time."""
    return config.monitor.run_name or config.monitor.wandb_run_name or time.strftime("%Y-%m-%d_%H-%M-%S")


def open_run_folder(config: Config, name: str, start_iteration: int) -> Path:
    """Make (or find) the folder of a run and write its config.yml.

    start_iteration: 0 for a run that starts afresh; an older metrics.jsonl is then kept as metrics.<n>.jsonl.
    Raises DeepyError where the folder cannot be written.
    """
    folder = Path(config.monitor.runs_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if start_iteration == 0:
            _set_aside(folder / "metrics.jsonl")
        text = yaml.safe_dump(saved_config(config), sort_keys=False, allow_unicode=True)
        (folder / "config.yml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise DeepyError(
            Problem(f"runs_dir = {config.monitor.runs_dir}", f"{error}.", "Set runs_dir to a folder that is writable.")
        ) from error
    return folder


def saved_config(config: Config) -> dict[str, object]:
    """Return the resolved config as one flat mapping, without anything secret at any depth."""
    return {key: _without_secrets(value) for key, value in config.flat().items() if not is_secret(key)}


def _without_secrets(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items() if not is_secret(str(key))}
    if isinstance(value, list | tuple):
        return [_without_secrets(inner) for inner in value]
    return value


def _set_aside(metrics: Path) -> None:
    if not metrics.exists():
        return
    number = 1
    while (old := metrics.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    metrics.rename(old)
