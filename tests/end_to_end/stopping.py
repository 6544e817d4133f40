"""A signal at a chosen moment of the tiny run, sent by the ranks to themselves, in the tests' forks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.engine.step import StepEngine
from megatron.monitor.build import Monitor
from megatron.parallel.mesh import Mesh
from megatron.parallel.rng import RngStreams
from megatron.training import run as assembly
from megatron.training.evaluate import Evaluator
from megatron.training.persistence import Keeper
from megatron.training.run import train
from megatron.training.stop import Outcome
from tests.end_to_end.tiny import config

CHANGES: dict[str, Any] = {"train_iters": 6, "eval_interval": 3, "checkpoint_factor": 5, "num_workers": 0}


def run(folder: Path, world_size: int = 1, phase: str = "", ranks: tuple[int, ...] = (), **changes: Any) -> Outcome:
    """Train the tiny run as one rank of `world_size`; a SIGTERM comes to `ranks` in `phase`, where one is named."""
    tiny = config(folder, world_size, **{**CHANGES, **changes})
    sizes = tiny.parallel
    mesh = Mesh.create(sizes.model_parallel_size, max(1, sizes.pipe_parallel_size), sizes.context_parallel_size)
    Monitor.plot = lambda self: None  # type: ignore[method-assign]  # drawing takes longer than the run
    if phase:
        send_in(phase, lambda: os.kill(os.getpid(), signal.SIGTERM) if mesh.world.rank in ranks else None)
    return train(tiny, mesh)


def send_in(phase: str, send: Callable[[], Any]) -> None:
    """Have this process call `send` once, in a phase of the run that it begins next."""
    place, name, when = PHASES[phase]
    original = getattr(place, name)
    left = [send]

    def sending(*arguments: Any, **keys: Any) -> Any:
        if left and when(arguments):
            left.pop()()
        return original(*arguments, **keys)

    setattr(place, name, sending)


def _calls(number: int) -> Callable[[Any], bool]:
    """Return what is true of the call of this number, from 1."""
    seen: list[int] = []

    def is_it(arguments: Any) -> bool:
        seen.append(1)
        return len(seen) == number

    return is_it


def _is_step(iteration: int, micro_batch: int) -> Callable[[Any], bool]:
    return lambda arguments: arguments[1:] == (iteration, micro_batch)


PHASES: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "before the model": (assembly, "build_model", _calls(1)),
    "the index": (assembly, "build_datasets", _calls(1)),
    "the first validation": (StepEngine, "evaluate", _calls(1)),
    "the first step": (RngStreams, "start_micro_batch", _is_step(0, 0)),
    "an accumulation": (RngStreams, "start_micro_batch", _is_step(1, 1)),
    "a validation": (StepEngine, "evaluate", _calls(3)),
    "the end of a validation": (Monitor, "log_validation", lambda arguments: arguments[1] == 3),
    "a save": (Keeper, "save", _calls(1)),
    "the last validation": (StepEngine, "evaluate", _calls(5)),
    "the test": (Evaluator, "evaluate", _calls(4)),
    "the end": (Monitor, "close", _calls(1)),
}


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
