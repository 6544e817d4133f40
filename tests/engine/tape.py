"""What stands for CUDA graphs on a CPU: a recording is a list of operations with their tensors and numbers.

As on a GPU, a replay runs nothing but those operations, on the same tensors, and no line of Python: a number that the
host had at the recording is that number for ever, and work that reads a value of the device cannot be recorded. Two
things differ. The first replay does nothing, since recording has done the work; and memory is never given to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.engine.graphs import Found

_READING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select"}


class Tape(TorchDispatchMode):
    """Notes the operations that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in _READING:
            raise RuntimeError(f"{name} waits for the device")
        found = function(*args, **(kwargs or {}))
        if not _is_view(function) and not name.startswith(("empty", "new_empty")):
            self.calls.append((function, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again, and put what they return where it was."""
        for function, args, kwargs, found in self.calls:
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                for place, value in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(value)


class TapeRecorder:
    """A `megatron.engine.graphs.Recorder`. recordings, replays, warm_ups: how many there were of all recorders."""

    recordings = replays = warm_ups = ends = 0

    def warm_up(self, work: Callable[[], Found]) -> Found:
        TapeRecorder.warm_ups += 1
        return work()

    def record(self, work: Callable[[], Found]) -> tuple[Callable[[], None], Found]:
        TapeRecorder.recordings += 1
        tape, is_done = Tape(), [True]
        with tape:
            found = work()

        def replay() -> None:
            TapeRecorder.replays += 1
            if not is_done[0]:
                tape.replay()
            is_done[0] = False

        return replay, found

    def start_anew(self) -> None:
        TapeRecorder.ends += 1

    @classmethod
    def forget(cls) -> None:
        """Count from 0."""
        cls.recordings = cls.replays = cls.warm_ups = cls.ends = 0


def _is_view(function: Any) -> bool:
    """Return whether an operation returns a view of what it is given, which it stays."""
    return any(given.alias_info is not None and not given.alias_info.is_write for given in function._schema.returns)
