"""`train_micro_batch_size_per_gpu: auto`: the largest micro-batch that fits, with the global batch that was asked for.

It is found before anything of the run exists, by steps of a model and an engine that are thrown away, on random tokens:

    one process to a model on a GPU    sizes that divide the batch are tried, from what the plan holds for the largest,
                                       until one runs out of memory
    all else                           steps of the two smallest sizes are measured, and a line through them says what
                                       larger ones need; on a CPU no less than the plan says

The ranks agree on the smallest of their answers. A run that resumes keeps the size that it had.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.engine import choose_engine
from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine.build import build_engine
from megatron.errors import MemoryShortageError, Problem
from megatron.logs import get_logger
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Mesh
from megatron.planning import micro_batch
from megatron.planning.layout import Layout
from megatron.planning.memory import GIBIBYTE
from megatron.training.out_of_memory import is_out_of_memory, make_planner
from megatron.training.room import forget_peak, in_use, room
from megatron.training.source import open_source

logger = get_logger(__name__)

_USABLE = {"cuda": 0.95, "cpu": 0.8}
"""Share of the free memory that a step may take: fragments, validation and data need some."""


def with_micro_batch(config: Config, mesh: Mesh, vocab_size: int) -> Config:
    """Return the config with the largest micro-batch that fits, where it asks for that; all ranks must call it.

    vocab_size: rows of the word embedding. Raises MemoryShortageError where not even one sequence fits.
    """
    if not config.batch.find_micro_batch_size:
        return config
    size, why = _kept(config, mesh) or _found(config, mesh, vocab_size)
    changed = _sized(config, size)
    batch = changed.batch
    steps = f"{size} x {batch.gradient_accumulation_steps} accumulated x {changed.parallel.data_parallel_size}"
    logger.info("train_micro_batch_size_per_gpu: auto is %s = %s: %s", steps, batch.train_batch_size, why)
    return changed


def _sized(config: Config, size: int) -> Config:
    own = config.batch.train_batch_size // config.parallel.data_parallel_size
    update = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": own // size}
    update["find_micro_batch_size"] = False  # it is found: a file of this config means this size
    return config.model_copy(update={"batch": config.batch.model_copy(update=update)})


def _kept(config: Config, mesh: Mesh) -> tuple[int, str] | None:
    """Return the size of the run that this one goes on with, where batch and processes are still the same."""
    opened = open_source(config.checkpoint, mesh)
    if opened is None or not opened.source.is_own:
        return None
    stored = opened.reader.manifest.config
    batch, parallel = stored.get("batch", {}), stored.get("parallel", {})
    same = batch.get("train_batch_size") == config.batch.train_batch_size
    axes = ("world_size", "model_parallel_size", "pipe_parallel_size", "context_parallel_size")
    if not same or any(parallel.get(axis) != getattr(config.parallel, axis) for axis in axes):
        return None
    return int(batch["train_micro_batch_size_per_gpu"]), f"that of the checkpoint {opened.source.folder}"


def _found(config: Config, mesh: Mesh, vocab_size: int) -> tuple[int, str]:
    sizes = micro_batch.sizes(Layout.of(config))
    with _untouched(mesh.device):
        alone = mesh.device.type == "cuda" and mesh.world.size == mesh.dp.size and _is_whole(config)
        size, why = (_by_trying if alone else _by_measuring)(config, mesh, vocab_size, sizes)
    agreed = torch.tensor(size, device=mesh.device)
    if mesh.world.size > 1:
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=mesh.world.group)
    if int(agreed) != size:
        why = "another rank has less memory"
    if not int(agreed):
        fix = "Use more or larger GPUs, checkpoint_activations: true, or ZeRO; `./deepy.py plan` says what would fit."
        raise MemoryShortageError(Problem("train_micro_batch_size_per_gpu = auto", f"no sequence fits: {why}.", fix))
    return int(agreed), why


def _is_whole(config: Config) -> bool:
    """Return whether a step needs no other rank but for its sums, so that each rank can try by itself."""
    return choose_engine(config).is_local


def _by_trying(config: Config, mesh: Mesh, vocab_size: int, sizes: list[int]) -> tuple[int, str]:
    """Return the largest size whose step ran, 0 where none did, and why."""
    device = mesh.device
    limit = _USABLE["cuda"] * room(device).free
    single = config.parallel.model_copy(update={"world_size": 1})
    trial = _Trial(config.model_copy(update={"parallel": single}), Mesh.single(device), vocab_size)
    guess = micro_batch.largest(make_planner(config, vocab_size, device), Layout.of(config), limit) or sizes[0]
    needed: dict[int, int | None] = {}

    def fits(size: int) -> bool:
        if size not in needed:
            needed[size] = trial.bytes_of(size)
        found = needed[size]
        return found is not None and found <= limit

    place = sizes.index(guess)
    while place + 1 < len(sizes) and fits(sizes[place]) and fits(sizes[place + 1]):
        place += 1
    while place >= 0 and not fits(sizes[place]):
        place -= 1
    trial.close()
    size = sizes[place] if place >= 0 else 0
    next_size = sizes[place + 1] if place + 1 < len(sizes) else None
    return size, _sentence(size, needed.get(size), next_size, needed.get(next_size or 0), limit, "measured")


def _by_measuring(config: Config, mesh: Mesh, vocab_size: int, sizes: list[int]) -> tuple[int, str]:
    """Return the largest size that fits by a line through two measured ones, 0 where none does, and why."""
    device = mesh.device
    shares = mesh.world.size if device.type == "cpu" else 1  # processes of a machine share its memory
    limit = _USABLE[device.type] * room(device).free / shares
    trial = _Trial(config, mesh, vocab_size)
    trial.bytes_of(sizes[0])  # the first step also makes what stays from step to step
    measured = [(size, trial.bytes_of(size)) for size in sizes[:2]]
    trial.close()
    points = [(size, number) for size, number in measured if number is not None]
    if len(points) < len(measured):
        return 0 if not points else points[0][0], "the next size ran out of memory"
    planner, layout = make_planner(config, vocab_size, device), Layout.of(config)

    def needs(size: int) -> float:
        (first, low), (second, high) = points[0], points[-1]
        slope = (high - low) / (second - first) if second > first else 0.0
        line = low + max(0.0, slope) * (size - first)
        return max(line, planner.peak(micro_batch.sized(layout, size))) if device.type == "cpu" else line

    fitting = [size for size in sizes if needs(size) <= limit]
    size = max(fitting, default=0)
    bigger = next((other for other in sizes if other > size), None)
    how = f"steps of {' and '.join(str(size) for size, _ in points)} were measured"
    return size, _sentence(size, needs(size) if size else None, bigger, needs(bigger) if bigger else None, limit, how)


def _sentence(size: int, needed: float | None, bigger: int | None, more: float | None, limit: float, how: str) -> str:
    """Return in a line what a size needs, what the next one would, and how that is known."""
    parts = [f"{size} needs {_gib(needed)}"] if size else []
    if bigger is not None:
        parts.append(f"{bigger} would need {'more than there is' if more is None else _gib(more)}")
    elif size:
        parts.append("the whole batch of a process")
    return f"{', '.join(parts)} of {_gib(limit)} that may be used ({how})"


def _gib(number: float | None) -> str:
    return "-" if number is None else f"{number / GIBIBYTE:.2f} GiB"


class _Trial:
    """A model and an engine to be thrown away."""

    def __init__(self, config: Config, mesh: Mesh, vocab_size: int) -> None:
        self._mesh = mesh
        self._vocab_size = vocab_size
        self._length = config.model.seq_length
        self._count = max(1, mesh.pp.size)  # as many micro-batches as a full pipeline holds
        self._before = in_use(mesh.device)
        data = config.parallel.data_parallel_size
        update = {"train_batch_size": self._count * data, "train_micro_batch_size_per_gpu": 1}
        batch = config.batch.model_copy(update={**update, "gradient_accumulation_steps": self._count})
        training = config.training.model_copy(update={"train_iters": 10**9})
        small = config.model_copy(update={"batch": batch, "training": training})
        try:
            model = build_model(small, vocab_size, mesh, initialized=False)
            self._engine: Any = build_engine(small, mesh, model, build_objective())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._engine = None

    def bytes_of(self, size: int) -> int | None:
        """Return the most bytes that a step with micro-batches of `size` has in use; None where there are too few."""
        if self._engine is None:
            return None
        forget_peak(self._mesh.device)
        try:
            self._engine.train_step([self._batch(size) for _ in range(self._count)], 0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            _tidy(self._mesh.device)
        return max(0, room(self._mesh.device).peak - self._before)

    def close(self) -> None:
        """Let go of everything."""
        live = getattr(self._engine, "_live", None)
        if live is not None:
            live.destroy()
        self._engine = None
        _tidy(self._mesh.device)

    def _batch(self, size: int) -> Batch:
        text = torch.randint(0, self._vocab_size, (size, self._length + 1))
        return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.ones(size, self._length))


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Restore the random generators' states."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
