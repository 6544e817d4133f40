"""SIGTERM, as a scheduler sends it before it takes the machine away: the step under way is the last, and is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

from megatron.parallel.mesh import Mesh


class StopRequest:
    """Whether any rank was asked to stop. A second SIGTERM ends the process at once."""

    def __init__(self, mesh: Mesh) -> None:
        self._world, self.is_asked = mesh.world, False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.close()
        self.is_asked = True

    def close(self) -> None:
        """Let SIGTERM end the process again."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Say, alike on all ranks, whether one of them was asked; every rank must call it. Costs 4 bytes over gloo."""
        if self._world.size == 1:
            return self.is_asked
        flag = torch.tensor([self.is_asked], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._world.group)
        return bool(flag.item())
