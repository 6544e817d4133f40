"""CUDA graphs: work of the device that is recorded once, and then launched as one piece.

    recorder = recorder_of(config, mesh)
    piece = Piece(recorder, work)
    numbers = piece()               # WARM_UP times the work itself, then a replay of its recording

A small model is done with a kernel before the host has launched the next; a graph has them launched by the device.
A recording is a list of kernels with the addresses and numbers that they were given. So the work takes nothing from the
host: what changes from step to step stands in tensors that stay where they are, and so does what it returns, which
the next replay overwrites. Random numbers are an exception: a replay draws from the generator as it is seeded then.

The first calls do the work on the stream of the recording, because libraries allocate, compile and choose at first use,
which a recording does not allow. Memory that the work takes while it is recorded stays its own.

No part of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from megatron.config.schema.config import Config
from megatron.errors import ConfigError, EngineError, Problem
from megatron.parallel.mesh import Mesh

Found = TypeVar("Found")

WARM_UP = 3
"""How often work is done as it is before it is recorded, as torch.cuda.make_graphed_callables has it."""


class Recorder(Protocol):
    """What does work as it will be recorded, and records it."""

    def warm_up(self, work: Callable[[], Found]) -> Found:
        """Do the work, and return what it returns."""
        ...

    def record(self, work: Callable[[], Found]) -> tuple[Callable[[], None], Found]:
        """Record the work without doing it; return what does it, and what the work returned: tensors that it fills."""
        ...

    def start_anew(self) -> None:
        """Wait until no recording is at work any more: all of them will be given up, before the next is made."""
        ...


class CudaRecorder:
    """Records CUDA graphs of one device, all on one stream and in one pool of memory.

    The stream stays, whatever becomes of the recordings: a parameter's node in the autograd graph belongs to the stream
    of the first backward pass as long as anything keeps it, and no recording may wait for another stream. So all
    training with recordings between is done there, by `warm_up`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Found]) -> Found:
        """Do the work on the stream of the recordings, between what was queued before it and what comes behind."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = work()
        here.wait_stream(self._stream)
        return found

    def record(self, work: Callable[[], Found]) -> tuple[Callable[[], None], Found]:
        """Record a graph; see `Recorder`. Raises EngineError where the work waits for the device, or the like."""
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile (NCCL's watchdog, a checkpoint in the background) is none of the recording's.
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                found = work()
        except RuntimeError as error:
            why = f"a step could not be recorded as a CUDA graph: {_first(error)}"
            raise EngineError(Problem("cuda_graphs = true", why, "Set cuda_graphs: auto.")) from error
        return graph.replay, found

    def start_anew(self) -> None:
        """Wait for the device, and take memory for the next recordings from a new pool."""
        torch.cuda.synchronize(self._device)
        self._pool = torch.cuda.graph_pool_handle()


def _first(error: BaseException) -> BaseException:
    """Return the error that others followed: where a recording is broken off, ending it fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Piece(Generic[Found]):
    """Work that is done as it is WARM_UP times, then recorded, and from then on replayed.

    It returns the same tensors at each replay: copy what must outlast the next one.
    """

    def __init__(self, recorder: Recorder, work: Callable[[], Found]) -> None:
        self._recorder, self._work = recorder, work
        self._calls = 0
        self._recorded: tuple[Callable[[], None], Found] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the next call is a replay."""
        return self._recorded is not None

    def __call__(self) -> Found:
        """Do the work, one way or the other."""
        if self._calls < WARM_UP:
            self._calls += 1
            return self._recorder.warm_up(self._work)
        if self._recorded is None:
            self._recorded = self._recorder.record(self._work)
        replay, found = self._recorded
        replay()
        return found


def obstacle(config: Config, mesh: Mesh) -> str:
    """Return why steps of a run cannot be recorded, or ""."""
    training = config.training
    reads_generator = training.checkpoint_operations is None or "attention" in training.checkpoint_operations
    if mesh.device.type != "cuda":
        return f"they need a CUDA device, and this is {mesh.device.type}."
    if mesh.tp.size > 1 or mesh.cp.size > 1:
        return "processes that share a layer or a sequence meet within a micro-batch."
    if training.checkpoint_activations and reads_generator:
        return "recomputation reads the random generator's state, which a recording cannot."
    if training.offload_activations:
        return "offload_activations copies to the CPU within a micro-batch."
    if config.optimizer.optimizer_in_backward:
        return "optimizer_in_backward updates weights within a micro-batch."
    return ""


def recorder_of(config: Config, mesh: Mesh) -> Recorder:
    """Return what records the steps of a run. Raises ConfigError where they cannot be recorded."""
    reason = obstacle(config, mesh)
    if reason:
        raise ConfigError(Problem("cuda_graphs = true", reason, "Set cuda_graphs: auto."))
    return CudaRecorder(mesh.device)
