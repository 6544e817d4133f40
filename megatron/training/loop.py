"""The training loop: batches -> engine -> result -> monitor, with validation and checkpoints when they are due."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.config.schema.training import TrainingConfig
from megatron.data.loaders import BatchLoader
from megatron.engine.base import Engine
from megatron.logs import get_logger
from megatron.monitor.build import Monitor
from megatron.training.evaluate import Evaluator
from megatron.training.persistence import Keeper
from megatron.training.progress import Progress
from megatron.training.stop import StopRequest

logger = get_logger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run, assembled. train_iters: its length in optimizer steps. valid: None where there is nothing
    to validate on."""

    training: TrainingConfig
    train_iters: int
    engine: Engine
    loader: BatchLoader
    valid: Evaluator | None
    keeper: Keeper
    monitor: Monitor
    stop: StopRequest


def run_loop(run: Run, progress: Progress) -> Progress:
    """Train from `progress` to the end of the run, its exit_interval or a SIGTERM; return how far it came."""
    if progress.iteration >= run.train_iters:
        run.monitor.message(
            f"nothing left to train: the checkpoint is of iteration {progress.iteration} and train_iters is "
            f"{run.train_iters}; set train_iters higher to go on"
        )
    if progress.iteration == 0:
        validate(run, progress)
        save_if_due(run, progress)
    while progress.iteration < run.train_iters:
        run.monitor.start_step(progress.iteration + 1)
        with run.monitor.timers.measure("batch"):
            batches = next(run.loader)
        result = run.engine.train_step(batches, progress.iteration)
        samples = run.loader.consumed_samples - progress.consumed_samples
        progress = progress.after_step(samples, result.num_tokens, result.skipped)
        run.monitor.log_step(progress.iteration, result)
        if result.num_tokens == 0:
            logger.warning("iteration %d trained on nothing: all labels of its batch are masked", progress.iteration)
        if is_due(progress, run.training.check_replicas_interval or None):
            run.engine.check_replicas()
        if is_due(progress, run.training.eval_interval) or progress.iteration == run.train_iters:
            validate(run, progress)
        save_if_due(run, progress)
        if is_due(progress, run.training.exit_interval):
            run.monitor.message(f"stopping at iteration {progress.iteration}, a multiple of exit_interval")
            break
        if run.stop.agreed():
            run.monitor.message(f"stopping at iteration {progress.iteration}, as SIGTERM asks")
            break
    tell_saved(run, progress, run.keeper.save(run.engine, progress))
    return progress


def save_if_due(run: Run, progress: Progress) -> None:
    """Save where the config says so, and show where."""
    tell_saved(run, progress, run.keeper.save_if_due(run.engine, progress))


def tell_saved(run: Run, progress: Progress, folder: Path | None) -> None:
    """Record a checkpoint, if one was saved."""
    if folder is not None:
        run.monitor.log_checkpoint(progress.iteration, folder)


def is_due(progress: Progress, interval: int | None) -> bool:
    """Say whether the iteration is a multiple of an interval; None is never due."""
    return interval is not None and progress.iteration % interval == 0


def validate(run: Run, progress: Progress) -> None:
    """Evaluate the validation set, where there is one, and show the result."""
    if run.valid is not None:
        evaluation = run.valid.evaluate(run.engine, run.valid.window(progress.iteration))
        run.monitor.log_validation(
            progress.iteration, evaluation.loss, character_perplexity=evaluation.character_perplexity
        )
