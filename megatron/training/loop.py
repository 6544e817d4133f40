"""The training loop: batches -> engine -> results -> monitor, with validation and checkpoints when they are due.

Steps are queued, and their results read a few steps late on a GPU; before a validation, a comparison, a checkpoint and
the end, all that was queued is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.config.schema.training import TrainingConfig
from megatron.data.prefetch import Steps
from megatron.engine.base import Engine
from megatron.monitor.build import Monitor
from megatron.training.collector import Collector
from megatron.training.evaluate import Evaluator
from megatron.training.persistence import Keeper
from megatron.training.progress import Progress
from megatron.training.results import Results
from megatron.training.stop import StopRequest
from megatron.whereabouts import Phase, inside


@dataclass(frozen=True)
class Run:
    """The parts of a run, assembled. train_iters: its length in optimizer steps. valid: None where there is nothing
    to validate on. late: steps after which a result is read."""

    training: TrainingConfig
    train_iters: int
    engine: Engine
    loader: Steps
    valid: Evaluator | None
    keeper: Keeper
    monitor: Monitor
    stop: StopRequest
    late: int = 0


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
    with Results(run.monitor, run.late) as results, Collector() as collector:
        progress = _train(run, progress, results, collector)
    tell_saved(run, progress, run.keeper.save(run.engine, progress))
    return progress


def _train(run: Run, progress: Progress, results: Results, collector: Collector) -> Progress:
    while progress.iteration < run.train_iters:
        results.start(progress.iteration + 1)
        with run.monitor.timers.measure("batch"):
            batches = next(run.loader)
        pending = run.engine.queue_step(batches, progress.iteration, run.stop.asks)
        progress = progress.after_step(run.loader.consumed_samples - progress.consumed_samples)
        pauses = _pauses(run, progress)
        progress = results.add(pending, progress, everything=pauses)
        collector.after_step(pauses)
        if is_due(progress, run.training.check_replicas_interval or None):
            with inside(Phase.CHECK):
                run.engine.check_replicas()
        if is_due(progress, run.training.eval_interval) or progress.iteration == run.train_iters:
            validate(run, progress)
        save_if_due(run, progress)
        if is_due(progress, run.training.exit_interval):
            run.monitor.message(f"stopping at iteration {progress.iteration}, a multiple of exit_interval")
            break
        if run.stop.agreed(results.stop):
            run.monitor.message(f"stopping at iteration {progress.iteration}, as SIGTERM asks")
            break
    return results.finish(progress)


def _pauses(run: Run, progress: Progress) -> bool:
    """Say whether the run waits for the device after this step, because something else is due."""
    training = run.training
    intervals = (training.check_replicas_interval or None, training.eval_interval, training.exit_interval)
    return (
        progress.iteration == run.train_iters
        or any(is_due(progress, interval) for interval in intervals)
        or run.keeper.is_due(progress)
    )


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
        with inside(Phase.VALIDATION):
            evaluation = run.valid.evaluate(run.engine, run.valid.window(progress.iteration))
        run.monitor.log_validation(
            progress.iteration, evaluation.loss, character_perplexity=evaluation.character_perplexity
        )
