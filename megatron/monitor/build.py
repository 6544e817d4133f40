"""The monitor of a run: one object that the loop tells everything, and that tells people and files.

    monitor = build_monitor(config, work, is_first_rank=mesh.world.rank == 0, start_iteration=progress.iteration)
    monitor.log_validation(0, loss)
    with monitor.timers.measure("batch"): ...
    monitor.log_step(iteration, result, seconds)      # iteration counts from 1: updates done, this one included
    monitor.log_checkpoint(iteration, folder)
    monitor.close()

On ranks other than the first it keeps quiet and writes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron import logs
from megatron.config.schema.config import Config
from megatron.monitor import comet_sink, plot, tensorboard_sink, wandb_sink
from megatron.monitor.display import Display, Shown, build_display
from megatron.monitor.metrics import MetricsFile
from megatron.monitor.run_folder import open_run_folder, run_name, saved_config
from megatron.monitor.sinks import GuardedSink, Sink
from megatron.monitor.throughput import Speed, StepClock, Work, speed
from megatron.monitor.timers import Timers

logger = logs.get_logger(__name__)


class StepValues(Protocol):
    """What the monitor reads of a step's result; see megatron.engine.base.StepResult."""

    @property
    def loss(self) -> float: ...  # noqa: D102
    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def grad_norm(self) -> float: ...  # noqa: D102
    @property
    def clipped_grad_norm(self) -> float: ...  # noqa: D102
    @property
    def loss_scale(self) -> float: ...  # noqa: D102
    @property
    def skipped(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class _Record:
    """The files of the first rank."""

    folder: Path
    metrics: MetricsFile
    sinks: list[GuardedSink]

    def send(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Hand numbers to all sinks."""
        for sink in self.sinks:
            sink.write(scalars, iteration)


class Monitor:
    """Shows, writes and sends what happens. folder: the run's folder; None on ranks other than the first."""

    def __init__(
        self,
        work: Work,
        display: Display,
        total_iterations: int,
        start_iteration: int = 0,
        record: _Record | None = None,
        title: str = "",
    ) -> None:
        self.work, self.total_iterations, self.title = work, total_iterations, title
        self.timers = Timers()
        self._display, self._record, self._clock = display, record, StepClock()
        self._skipped = 0
        self._begin = time.monotonic()
        if record is not None:
            record.metrics.write("start", start_iteration)

    @property
    def folder(self) -> Path | None:
        """The run's folder; None on ranks other than the first."""
        return self._record.folder if self._record is not None else None

    def log_step(self, iteration: int, values: StepValues, seconds: float) -> None:
        """Record one optimizer step.

        iteration: updates done, this one included. seconds: wall time of the step, its batch included.
        """
        self._clock.add(seconds)
        self._skipped += values.skipped
        if self._record is None:
            return
        now = speed(self.work, seconds)
        self._record.metrics.write(
            "step",
            iteration,
            loss=values.loss,
            learning_rate=values.learning_rate,
            grad_norm=values.grad_norm,
            clipped_grad_norm=values.clipped_grad_norm,
            loss_scale=values.loss_scale,
            skipped=values.skipped,
            num_tokens=values.num_tokens,
            seconds=seconds,
            tokens_per_second=now.tokens_per_second,
        )
        self._record.send({**_step_scalars(values), **_speed_scalars(now), **self._timings()}, iteration)
        if self._display.is_due(iteration):
            self._display.show(self._shown(iteration, values))

    def _timings(self) -> dict[str, float]:
        return {f"timers/{name}": seconds for name, seconds in self.timers.drain().items()}

    def _shown(self, iteration: int, values: StepValues) -> Shown:
        mean = self._clock.mean()
        return Shown(
            iteration,
            self.total_iterations,
            values.loss,
            values.learning_rate,
            values.grad_norm,
            values.clipped_grad_norm,
            speed(self.work, mean),
            mean * max(0, self.total_iterations - iteration),
            values.loss_scale,
            self._skipped,
        )

    def log_validation(self, iteration: int, loss: float, name: str = "validation") -> None:
        """Record a loss over held-out data, in nats per token. name: "validation" or "test"."""
        if self._record is None:
            return
        perplexity = math.exp(min(loss, 700.0))
        self._record.metrics.write(name, iteration, loss=loss, perplexity=perplexity)
        self._record.send({f"{name}/lm_loss": loss, f"{name}/lm_loss_ppl": perplexity}, iteration)
        logger.info(f"{name} at iteration {iteration}: loss {loss:.4f}, perplexity {perplexity:,.2f}")

    def log_event(self, event: str, iteration: int, **values: float | str) -> None:
        """Append an event of the loop to metrics.jsonl, such as the moment at which the first step begins."""
        if self._record is not None:
            self._record.metrics.write(event, iteration, **values)

    def log_checkpoint(self, iteration: int, folder: Path) -> None:
        """Say that a checkpoint was written, and bring the loss plot up to date."""
        if self._record is None:
            return
        self._record.metrics.write("checkpoint", iteration, folder=str(folder))
        logger.info(f"checkpoint at iteration {iteration}: {folder}")
        self.plot()

    def message(self, text: str) -> None:
        """Say something to the person at rank 0's screen."""
        logger.info(text)

    def plot(self) -> Path | None:
        """Draw loss.png; return its path, or None where it could not be drawn (said once) or on other ranks."""
        if self._record is None:
            return None
        image = self._record.folder / "loss.png"
        try:
            plot.plot_loss(self._record.folder / "metrics.jsonl", image, self.title)
        except ImportError as error:
            logger.warning(f"no loss plot: {error}. To have it: {plot.INSTALL}")
        except Exception as error:
            logger.warning(f"no loss plot: {type(error).__name__}: {error}")
        return image if image.exists() else None

    def close(self) -> None:
        """Draw the plot, leave the screen tidy, and close all files and sinks."""
        self._display.close()
        if self._record is None:
            return
        self.plot()
        for sink in self._record.sinks:
            sink.close()
        self._record.metrics.close()


def _step_scalars(values: StepValues) -> dict[str, float]:
    """Return a step's numbers under the names that GPT-NeoX's dashboards use."""
    return {
        "train/lm_loss": values.loss,
        "train/learning_rate": values.learning_rate,
        "train/grad_norm": values.grad_norm,
        "train/clipped_grad_norm": values.clipped_grad_norm,
        "train/loss_scale": values.loss_scale,
        "train/skipped": float(values.skipped),
    }


def _speed_scalars(now: Speed) -> dict[str, float]:
    rates = {
        "runtime/samples_per_sec": now.samples_per_second,
        "runtime/iteration_time": now.seconds,
        "runtime/steps_per_sec": 1 / now.seconds,
        "runtime/tokens_per_sec": now.tokens_per_second,
    }
    optional = {
        "runtime/flops_per_sec_per_gpu": now.tflops_per_device * 1e12 if now.tflops_per_device is not None else None,
        "runtime/model_flops_utilization": now.mfu,
        "runtime/causal_model_flops_utilization": now.causal_mfu,
        "runtime/hardware_flops_utilization": now.hfu,
    }
    return {**rates, **{name: value for name, value in optional.items() if value is not None}}


def build_monitor(
    config: Config, work: Work, is_first_rank: bool, total_iterations: int, start_iteration: int = 0
) -> Monitor:
    """Return the monitor of this process: on the first rank with the run's folder and sinks, elsewhere a quiet one.

    start_iteration: the iteration the run resumes from; 0 starts its metrics afresh.
    Raises DeepyError where the run's folder cannot be written.
    """
    display = build_display(total_iterations, start_iteration, config.monitor.log_interval, is_first_rank)
    if not is_first_rank:
        return Monitor(work, display, total_iterations)
    name = run_name(config)
    folder = open_run_folder(config, name, start_iteration)
    sinks = [sink for sink in _open_sinks(config, name, folder) if sink.is_open]
    record = _Record(folder, MetricsFile(folder / "metrics.jsonl"), sinks)
    return Monitor(work, display, total_iterations, start_iteration, record, name)


def _open_sinks(config: Config, name: str, folder: Path) -> list[GuardedSink]:
    monitor, saved = config.monitor, saved_config(config)
    wanted: list[tuple[bool, str, Callable[[], Sink], str]] = [
        (
            monitor.tensorboard_dir is not None,
            "TensorBoard",
            lambda: tensorboard_sink.TensorBoardSink(Path(str(monitor.tensorboard_dir)) / name),
            tensorboard_sink.INSTALL,
        ),
        (
            wandb_sink.is_wanted(monitor),
            "Weights & Biases",
            lambda: wandb_sink.WandbSink(monitor, name, folder, saved),
            wandb_sink.INSTALL,
        ),
        (
            bool(monitor.use_comet),
            "Comet",
            lambda: comet_sink.CometSink(monitor, name, saved),
            comet_sink.INSTALL,
        ),
    ]
    return [GuardedSink(label, open_sink, install) for is_on, label, open_sink, install in wanted if is_on]
