"""SIGTERM, as a scheduler sends it before it takes the machine away: the step under way is the last, and is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from megatron.parallel.mesh import Mesh


class StopRequest:
    """Whether this rank was asked to stop. A second SIGTERM ends the process at once."""

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

    def asks(self) -> bool:
        """Say whether this process was asked; a step tells the other ranks."""
        return self.is_asked

    def agreed(self, told: bool) -> bool:
        """Say, alike on all ranks, whether one of them was asked. told: whether a step's result says so.

        A process that is alone need not wait for that."""
        return told or (self._world.size == 1 and self.is_asked)
