"""A training run, assembled: `train(config, mesh)` reads like a table of contents."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron import signals
from megatron.config.readiness import require_ready
from megatron.config.schema.config import Config
from megatron.data.build import DataSets, build_datasets
from megatron.data.gpt import SampleReader
from megatron.data.loaders import BatchLoader, build_loader
from megatron.data.prefetch import on_device
from megatron.engine.base import Engine
from megatron.engine.build import build_engine
from megatron.errors import DataError, Problem
from megatron.interop.build import export_obstacles
from megatron.logs import get_logger
from megatron.model.accounting import flops_per_token, padded_vocab_size
from megatron.model.build import build_model
from megatron.monitor.build import Monitor, build_monitor
from megatron.monitor.throughput import Work, known_peak
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.training.after_load import AfterLoad
from megatron.training.clocks import Clocks
from megatron.training.evaluate import Evaluator
from megatron.training.loop import Run, run_loop
from megatron.training.micro_batch import with_micro_batch
from megatron.training.out_of_memory import explained
from megatron.training.persistence import Keeper
from megatron.training.progress import Progress
from megatron.training.results import steps_late
from megatron.training.stop import Agreement, Outcome, stopped
from megatron.whereabouts import Phase, enter, inside

logger = get_logger(__name__)


def train(config: Config, mesh: Mesh, config_files: Mapping[str, str] | None = None) -> Outcome:
    """Train as the config says, on every rank of the mesh; return how far the run came, and whether it was stopped.

    config_files: name -> text of the files that the config was read from, which each checkpoint keeps.
    Raises DeepyError for what the user can mend: data, tokenizer, checkpoint, combinations of settings.
    """
    require_ready(config)
    enter(Phase.TOKENIZER)
    tokenizer = build_tokenizer(config.tokenizer)
    tensor_parallel_size = config.parallel.model_parallel_size
    new_size = padded_vocab_size(tokenizer.vocab_size, config.model.make_vocab_size_divisible_by, tensor_parallel_size)
    enter(Phase.TRIAL)
    config = with_micro_batch(config, mesh, new_size)
    enter(Phase.DATA_INDEX)
    data = _open_data(config, mesh, tokenizer)
    config = _with_length(config, data.train_iters)
    enter(Phase.CHECKPOINT_SEARCH)
    with ExitStack() as stack:
        recorded = {"train_order": data.train_order, "config_files": config_files}
        keeper = Keeper(config, mesh, tokenizer, recorded, data.train)
        stack.callback(keeper.close)
        config = keeper.config
        _tell_obstacles(config)
        assembly = _Assembly(config, mesh, tokenizer, stack)
        vocab_size = keeper.vocabulary(new_size, tensor_parallel_size)
        scene = stack.enter_context(explained(config, mesh, vocab_size))
        after_load = None if keeper.is_fresh else AfterLoad(vocab_size, keeper.described)
        engine, progress = assembly.engine(vocab_size, keeper)
        scene.engine = engine
        monitor = assembly.monitor(vocab_size, progress)
        for summary in data.summaries:
            monitor.message(str(summary))
        run = Run(
            training=config.training,
            train_iters=data.train_iters,
            engine=engine,
            loader=on_device(assembly.loader(data.train, progress.consumed_samples), mesh.device),
            valid=assembly.evaluator(data.valid),
            keeper=keeper,
            monitor=monitor,
            stop=assembly.agreement(),
            late=steps_late(mesh.device),
            after_load=after_load,
        )
        begun, progress = progress, run_loop(run, progress)
        test = assembly.evaluator(data.test)
        if test is not None and progress.iteration == data.train_iters and run.stop.reason is None:
            with inside(Phase.VALIDATION):
                found = test.evaluate(engine, 0, run.stop)
            if found is not None:
                monitor.log_validation(progress.iteration, found.loss, "test", found.character_perplexity)
    if run.stop.reason is None:
        return Outcome(progress)
    return Outcome(progress, stopped(config, run.stop.reason, begun, progress))


@dataclass(frozen=True)
class _Assembly:
    """Builds the parts that share config, mesh and tokenizer; what must be closed goes on the stack."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    stack: ExitStack

    def engine(self, vocab_size: int, keeper: Keeper) -> tuple[Engine, Progress]:
        """Return the engine with the weights and the state that the run begins with, and its progress."""
        enter(Phase.MODEL)
        model = build_model(self.config, vocab_size, self.mesh, initialized=keeper.is_fresh)
        shapes = model.full_shapes()
        enter(Phase.ENGINE)
        engine = build_engine(self.config, self.mesh, model, build_objective())
        with inside(Phase.LOAD):
            return engine, keeper.restore(engine, shapes)

    def monitor(self, vocab_size: int, progress: Progress) -> Monitor:
        """Return the monitor, which shows and writes on rank 0 only."""
        config, world = self.config, self.mesh.world
        tokens = config.batch.train_batch_size * config.model.seq_length
        work = Work(
            samples=config.batch.train_batch_size,
            tokens=tokens,
            world_size=world.size,
            flops_per_token=flops_per_token(config.model, vocab_size, causal=False),
            causal_flops_per_token=flops_per_token(config.model, vocab_size, causal=True),
            peak_tflops=config.monitor.peak_theoretical_tflops or _known_peak(self.mesh.device),
            recomputes=config.training.checkpoint_activations and config.training.checkpoint_operations is None,
        )
        monitor = build_monitor(config, work, world.rank == 0, config.training.train_iters or 0, progress.iteration)
        return self.stack.enter_context(monitor)

    def loader(self, dataset: SampleReader, consumed_samples: int) -> BatchLoader:
        """Return this rank's loader at its position; its threads end with the run."""
        eod = self.tokenizer.eod if self.config.training.eod_mask_loss else None
        ranks = {"dp_rank": self.mesh.dp.rank, "dp_size": self.mesh.dp.size}
        loader = build_loader(self.config, dataset, consumed_samples=consumed_samples, eod_token=eod, **ranks)
        return self.stack.enter_context(loader)

    def agreement(self) -> Agreement:
        """Return what takes this rank's signals from now on, until the run ends."""
        if threading.current_thread() is not threading.main_thread():
            inbox = None
        else:
            if not signals.is_open():
                self.stack.callback(signals.close_inbox)
            inbox = signals.open_inbox()
            inbox.hold()
        return Agreement(self.mesh, inbox, Clocks(self.config, os.environ, steps_late(self.mesh.device)))

    def evaluator(self, dataset: SampleReader | None) -> Evaluator | None:
        """Return the evaluator of a validation or test set, or None where there is none or eval_iters is 0."""
        if dataset is None or self.config.training.eval_iters == 0:
            return None
        return Evaluator(self.config, self.mesh, self.loader(dataset, 0), self.tokenizer)


def _tell_obstacles(config: Config) -> None:
    """Say before training what would keep its model from being exported after it."""
    obstacles = export_obstacles(config)
    if obstacles:
        why = "; ".join(f"{problem.what}: {problem.why}" for problem in obstacles)
        logger.info("This model will have no Hugging Face counterpart, so that it cannot be exported: %s", why)


def _known_peak(device: torch.device) -> float | None:
    """Return the peak of a GPU in TFLOP/s, where its name is known; None for a CPU."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _open_data(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> DataSets:
    return build_datasets(
        config,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        is_builder=mesh.world.rank == 0,
        barrier=lambda: None if mesh.world.size == 1 else dist.barrier(group=mesh.world.group),
    )


def _with_length(config: Config, train_iters: int) -> Config:
    """Return the config of a run whose length in steps is known, which train_epochs alone does not say."""
    if train_iters < 1:
        why = "the training data set has fewer samples than one global batch."
        what = f"train_epochs = {config.training.train_epochs}"
        raise DataError(Problem(what, why, "Use a smaller batch or more data."))
    training = config.training.model_copy(update={"train_iters": train_iters})
    return config.model_copy(update={"training": training})
