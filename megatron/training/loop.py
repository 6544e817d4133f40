"""The training loop: batches -> engine -> results -> monitor, with validation and checkpoints when they are due.

Steps are queued, and their results read a few steps late on a GPU; before a validation, a comparison, a checkpoint and
the end, all that was queued is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron.config.schema.training import TrainingConfig
from megatron.data.prefetch import Steps
from megatron.engine.base import Engine
from megatron.errors import DivergedError
from megatron.monitor.build import Monitor
from megatron.training.after_load import AfterLoad
from megatron.training.collector import Collector
from megatron.training.evaluate import Evaluator
from megatron.training.guards import Guards
from megatron.training.incidents import Incidents
from megatron.training.persistence import Keeper
from megatron.training.progress import Progress
from megatron.training.results import Results
from megatron.training.stop import Agreement
from megatron.whereabouts import Phase, inside


@dataclass(frozen=True)
class Run:
    """The parts of a run, assembled. train_iters: its length in optimizer steps. valid: None where there is nothing
    to validate on. late: steps after which a result is read. after_load: None where no weights were loaded."""

    training: TrainingConfig
    train_iters: int
    engine: Engine
    loader: Steps
    valid: Evaluator | None
    keeper: Keeper
    monitor: Monitor
    stop: Agreement
    late: int = 0
    after_load: AfterLoad | None = None


def run_loop(run: Run, progress: Progress) -> Progress:
    """Train from `progress` to the end of the run, its exit_interval or an agreement to stop; return how far it came.

    What is done is saved in the end, whatever ended it."""
    if progress.iteration >= run.train_iters and not progress.owes_validation:
        run.monitor.message(
            f"nothing left to train: the checkpoint is of iteration {progress.iteration} and train_iters is "
            f"{run.train_iters}; set train_iters higher to go on"
        )
    begun = progress.iteration
    if begun == 0 or progress.owes_validation:
        progress = validate(run, progress)
    if begun == 0 and run.stop.reason is None:
        save_if_due(run, progress)
    if run.stop.reason is None:
        progress = _guarded(run, progress)
    if run.stop.reason is None or progress.iteration > begun:
        _timed(run, lambda: run.keeper.save(run.engine, progress))
        _tell_written(run)
    return progress


def _guarded(run: Run, progress: Progress) -> Progress:
    """Train, with what is done about steps that were left out."""

    def save(progress: Progress) -> None:
        _timed(run, lambda: run.keeper.save(run.engine, progress))
        _tell_written(run)

    guards = Guards(run.training)
    incidents = Incidents(guards, run.engine, run.loader, run.keeper, run.monitor, save)
    with Results(run.monitor, run.late, guards, run.after_load) as results, Collector() as collector:
        try:
            return _train(run, progress, results, incidents, collector)
        except DivergedError:
            if results.diverged is not None:
                incidents.report(results.diverged)
            raise


def _train(run: Run, progress: Progress, results: Results, incidents: Incidents, collector: Collector) -> Progress:
    while progress.iteration < run.train_iters:
        results.start(progress.iteration + 1)
        with run.monitor.timers.measure("batch"):
            batches = next(run.loader)
        limits, begin = incidents.guards.limits(progress.guard, progress.iteration + 1), progress.consumed_samples
        pending = run.engine.queue_step(batches, progress.iteration, run.stop.wishes, limits)
        progress = progress.after_step(run.loader.consumed_samples - begin)
        pauses, queued = _pauses(run, progress), progress.iteration
        progress = incidents.handle(results.add(pending, progress, pauses, begin, limits), results)
        run.stop.hear(results.wishes)
        if run.stop.wants_save:
            progress = incidents.handle(results.finish(progress), results)
            run.stop.hear(results.wishes)
        collector.after_step(pauses)
        if progress.iteration < queued:
            continue  # it went back
        if is_due(progress, run.training.check_replicas_interval or None):
            with inside(Phase.CHECK):
                run.engine.check_replicas()
        if is_due(progress, run.training.eval_interval) or progress.iteration == run.train_iters:
            progress = validate(run, progress)
        if run.stop.reason is not None:
            run.monitor.message(f"stopping at iteration {progress.iteration}, as asked by {run.stop.reason}")
            break
        save_if_due(run, progress)
        results.wishes.clear()
        if is_due(progress, run.training.exit_interval):
            run.monitor.message(f"stopping at iteration {progress.iteration}, a multiple of exit_interval")
            break
    return incidents.handle(results.finish(progress), results)


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
    """Save where the config says so or the ranks have agreed to, and show what was saved, in the background too."""
    now = run.stop.wants_save
    if now or run.keeper.is_due(progress):
        _timed(run, lambda: run.keeper.save_if_due(run.engine, progress, now))
    _tell_written(run)


def _timed(run: Run, save: Callable[[], None]) -> None:
    """Save, and say how long it took to whom that concerns."""
    begin = time.perf_counter()
    save()
    run.stop.saved(time.perf_counter() - begin)


def _tell_written(run: Run) -> None:
    """Record the checkpoints that have been written."""
    for iteration, folder, seconds in run.keeper.written():
        run.stop.wrote(seconds)
        run.monitor.log_checkpoint(iteration, str(folder))


def is_due(progress: Progress, interval: int | None) -> bool:
    """Say whether the iteration is a multiple of an interval; None is never due."""
    return interval is not None and progress.iteration % interval == 0


def validate(run: Run, progress: Progress) -> Progress:
    """Evaluate the validation set, where there is one, and show the result; return the progress without that debt.

    Where the ranks stop, the validation is given up, or not begun, and the run that goes on owes it."""
    if run.valid is None:
        return progress
    evaluation = None
    if run.stop.reason is None:
        with inside(Phase.VALIDATION):
            evaluation = run.valid.evaluate(run.engine, run.valid.window(progress.iteration), run.stop)
    if evaluation is not None:
        run.monitor.log_validation(
            progress.iteration, evaluation.loss, character_perplexity=evaluation.character_perplexity
        )
    return replace(progress, owes_validation=evaluation is None)
