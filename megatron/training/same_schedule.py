"""A run that goes on keeps the learning rate it would have had, unless it is told which of two schedules to follow.

The schedule is a function of the config, so a changed `lr`, `warmup` or `train_iters` (the horizon, where
lr_decay_iters is not set) moves the learning rate of a run half-way. That is refused, with both rates, until the
config says `override_lr_scheduler: true` (its own schedule) or `use_checkpoint_lr_scheduler: true` (the checkpoint's).
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron.checkpoint.load import CheckpointReader
from megatron.config.schema.config import Config
from megatron.config.schema.training import OptimizerConfig
from megatron.errors import CheckpointError, ConfigError, Problem
from megatron.logs import get_logger
from megatron.optim.schedules import decay_horizon, learning_rate, peak_learning_rate

logger = get_logger(__name__)

_KEYS = ("min_lr", "warmup", "lr_decay_style", "wsd_decay_fraction", "wsd_decay_shape", "neox_compat")


def with_agreed_schedule(config: Config, reader: CheckpointReader) -> Config:
    """Return the config with the schedule that a run which goes on from a checkpoint follows.

    Raises CheckpointError where the learning rates of the remaining steps differ and the config does not say which to
    take. A checkpoint before the first step, and one whose schedule this version cannot read, decide nothing.
    """
    done = int(reader.manifest.progress.get("iteration", 0))
    stored = _stored(reader)
    if done == 0 or stored is None or config.training.train_iters is None:
        return config
    theirs, their_iters = stored
    ours, our_iters = config.optimizer, config.training.train_iters
    changes = ", ".join(_changes(theirs, their_iters, ours, our_iters))
    if not changes or all(
        _rate(theirs, their_iters, step) == _rate(ours, our_iters, step) for step in range(done, our_iters)
    ):
        return config
    told = f"{_rate(theirs, their_iters, done):.6g} -> {_rate(ours, our_iters, done):.6g}"
    if config.checkpoint.use_checkpoint_lr_scheduler:
        logger.warning("learning rate at iteration %d: the checkpoint's schedule stays (%s)", done, changes)
        return config.model_copy(update={"optimizer": _with_schedule(ours, theirs, their_iters)})
    if config.checkpoint.override_lr_scheduler:
        logger.warning("learning rate at iteration %d: %s, by another schedule (%s)", done, told, changes)
        return config
    longer = (
        " train_iters is the horizon of the decay where lr_decay_iters is not set."
        if our_iters != their_iters and ours.lr_decay_iters is None
        else ""
    )
    raise CheckpointError(
        Problem(
            where=str(reader.folder),
            what=f"learning rate at iteration {done}: {told}",
            why=f"this run has another schedule than the checkpoint ({changes}).{longer}",
            fix="Set use_checkpoint_lr_scheduler: true to keep the checkpoint's (after its end it stays where it "
            "ended), or override_lr_scheduler: true to follow this config's.",
        )
    )


def _stored(reader: CheckpointReader) -> tuple[OptimizerConfig, int] | None:
    """Return what decides the checkpoint's schedule, or None where this version cannot read it."""
    sections = reader.manifest.config
    train_iters = sections.get("training", {}).get("train_iters")
    try:
        optimizer = OptimizerConfig.model_validate(sections.get("optimizer", {}))
        peak_learning_rate(optimizer)
    except (ValidationError, ConfigError):
        logger.warning("the schedule of %s cannot be read by this version; this config's is followed", reader.folder)
        return None
    return (optimizer, int(train_iters)) if train_iters else None


def _rate(optimizer: OptimizerConfig, train_iters: int, iteration: int) -> float:
    return learning_rate(optimizer, train_iters, iteration)


def _changes(theirs: OptimizerConfig, their_iters: int, ours: OptimizerConfig, our_iters: int) -> list[str]:
    """Return "key then -> now" of what decides a schedule and differs."""
    then, now = _facts(theirs, their_iters), _facts(ours, our_iters)
    return [f"{key} {then[key]} -> {now[key]}" for key in now if then[key] != now[key]]


def _facts(optimizer: OptimizerConfig, train_iters: int) -> dict[str, Any]:
    facts = {key: getattr(optimizer, key) for key in _KEYS}
    return {"lr": peak_learning_rate(optimizer), "horizon": decay_horizon(optimizer, train_iters), **facts}


def _with_schedule(ours: OptimizerConfig, theirs: OptimizerConfig, their_iters: int) -> OptimizerConfig:
    """Return our optimizer with their schedule, whatever the length of our run."""
    params = {**ours.optimizer.get("params", {}), "lr": peak_learning_rate(theirs)}
    schedule = {key: getattr(theirs, key) for key in _KEYS if key != "neox_compat"}
    horizon = {"lr_decay_iters": decay_horizon(theirs, their_iters), "lr_decay_fraction": None}
    return ours.model_copy(update={"optimizer": {**ours.optimizer, "params": params}, **schedule, **horizon})
