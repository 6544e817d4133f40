"""The monitor of a run: one object that the loop tells everything, and that tells people and files.

    with build_monitor(config, work, is_first_rank=mesh.world.rank == 0, total_iterations=1000) as monitor:
        monitor.log_validation(0, loss)
        monitor.start_step(1)              # iterations count from 1: updates done, this one included
        with monitor.timers.measure("batch"): ...
        monitor.log_step(1, result)
        monitor.log_checkpoint(1, folder)

On ranks other than the first it keeps quiet and writes nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from megatron import logs, whereabouts
from megatron.config.schema.config import Config
from megatron.monitor import comet_sink, plot, tensorboard_sink, wandb_sink
from megatron.monitor.display import Display, Shown, Silent, build_display
from megatron.monitor.metrics import MetricsFile
from megatron.monitor.run_folder import open_run_folder, run_name, saved_config
from megatron.monitor.sinks import GuardedSink, Sink
from megatron.monitor.throughput import Speed, StepClock, Work, speed
from megatron.monitor.timers import Timers

PLOT_SECONDS = 60.0
"""Plots drawn at checkpoints are at least this far apart: drawing takes about a second."""

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
        self._incidents: Counter[str] = Counter()
        self._step_begin: float | None = None
        self._plotted = time.monotonic()
        if record is not None:
            record.metrics.write("start", start_iteration)

    @property
    def folder(self) -> Path | None:
        """The run's folder; None on ranks other than the first."""
        return self._record.folder if self._record is not None else None

    def start_step(self, iteration: int) -> None:
        """Say that an optimizer step begins, which messages then name."""
        whereabouts.begin_step(iteration)
        if self._step_begin is None and self._record is not None:
            self._record.metrics.write("first_step", iteration, seconds_since_launch=_seconds_since_launch())
        self._step_begin = time.perf_counter()

    def log_step(self, iteration: int, values: StepValues, seconds: float | None = None) -> None:
        """Record an optimizer step. iteration: updates done, this one included.

        seconds: what it took; None where it is the step that `start_step` began, and it ends now."""
        if seconds is None:
            seconds = time.perf_counter() - self._step_begin if self._step_begin is not None else 0.0
        seconds = max(seconds, 1e-9)
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
            dict(self._incidents),
        )

    def log_validation(
        self, iteration: int, loss: float, name: str = "validation", character_perplexity: float | None = None
    ) -> None:
        """Record a loss over held-out data, in nats per token.

        name: "validation" or "test". character_perplexity: per character of the text, where it is measured.
        """
        if self._record is None:
            return
        perplexity = math.exp(min(loss, 700.0))
        values = {"loss": loss, "perplexity": perplexity}
        scalars = {f"{name}/lm_loss": loss, f"{name}/lm_loss_ppl": perplexity}
        per_character = ""
        if character_perplexity is not None:
            values["character_perplexity"] = scalars[f"{name}/lm_loss_char_lvl_ppl"] = character_perplexity
            per_character = f", {character_perplexity:.3f} per character"
        self._record.metrics.write(name, iteration, **values)
        self._record.send(scalars, iteration)
        logger.info(f"{name} at iteration {iteration}: loss {loss:.4f}, perplexity {perplexity:,.2f}{per_character}")

    def log_checkpoint(self, iteration: int, folder: Path | str) -> None:
        """Record that a checkpoint was written, and bring the loss plot up to date if the last is a minute old."""
        if self._record is None:
            return
        self._record.metrics.write("checkpoint", iteration, folder=str(folder))
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self.plot()

    def log_incident(self, kind: str, iteration: int, **values: Any) -> None:
        """Record a step that was left out. kind: "spike" or "not_finite". values: why, and its samples."""
        self._incidents[kind] += 1
        if self._record is not None:
            self._record.metrics.write(kind, iteration, **values)
            self._record.send({f"train/{kind}s": float(self._incidents[kind])}, iteration)

    def log_rollback(self, iteration: int, back_to: int, samples: Sequence[int]) -> None:
        """Record that the run goes back from a spike to a checkpoint; the steps between count no longer.

        iteration: of the spike. back_to: of the checkpoint. samples: [begin, end) of those left out."""
        self._incidents["rollback"] += 1
        if self._record is not None:
            self._record.metrics.write("rollback", iteration, back_to=back_to, samples=list(samples))
            self._record.send({"train/rollbacks": float(self._incidents["rollback"])}, iteration)

    def message(self, text: str) -> None:
        """Say something to the person at rank 0's screen."""
        logger.info(text)

    def plot(self) -> Path | None:
        """Draw loss.png; return its path, or None where it could not be drawn (said once) or on other ranks."""
        if self._record is None:
            return None
        self._plotted = time.monotonic()
        image = self._record.folder / "loss.png"
        try:
            plot.plot_loss(self._record.folder / "metrics.jsonl", image, self.title)
        except ImportError as error:
            logger.warning(f"no loss plot: {error}. To have it: {plot.INSTALL}")
        except Exception as error:
            logger.warning(f"no loss plot: {type(error).__name__}: {error}")
        return image if image.exists() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Draw the plot, leave the screen tidy, and close all files and sinks. failed: the run ended by an error."""
        self._display.close()
        if self._record is None:
            return
        image = self.plot()
        if image is not None:
            logger.info(f"loss plot: {image}")
        for sink in self._record.sinks:
            sink.close(failed)
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


def _seconds_since_launch() -> float | None:
    """Return the seconds since the launcher began, which it left in the environment; None without it."""
    begin = os.environ.get("DEEPY_LAUNCH_TIME")
    return time.time() - float(begin) if begin else None


def build_monitor(
    config: Config, work: Work, is_first_rank: bool, total_iterations: int, start_iteration: int = 0
) -> Monitor:
    """Return the monitor of this process: on the first rank with the run's folder and sinks, elsewhere a quiet one.

    start_iteration: the iteration the run resumes from; 0 starts its metrics afresh.
    Raises DeepyError where the run's folder cannot be written.
    """
    if not is_first_rank:
        return Monitor(work, Silent(), total_iterations)
    name = run_name(config)
    folder = open_run_folder(config, name, start_iteration)
    sinks = [sink for sink in _open_sinks(config, name, folder, start_iteration) if sink.is_open]
    record = _Record(folder, MetricsFile(folder / "metrics.jsonl"), sinks)
    display = build_display(total_iterations, start_iteration, config.monitor.log_interval)
    return Monitor(work, display, total_iterations, start_iteration, record, name)


def _open_sinks(config: Config, name: str, folder: Path, start_iteration: int) -> list[GuardedSink]:
    monitor, saved = config.monitor, saved_config(config)
    wanted: list[tuple[bool, str, Callable[[], Sink], str]] = [
        (
            monitor.tensorboard_dir is not None,
            "TensorBoard",
            lambda: tensorboard_sink.TensorBoardSink(Path(str(monitor.tensorboard_dir)) / name, start_iteration),
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
