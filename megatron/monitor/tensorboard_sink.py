"""TensorBoard event files, written without torch or TensorFlow.

Read them with `tensorboard --logdir <tensorboard_dir>`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

INSTALL = "pip install -r requirements/tensorboard.txt"


class TensorBoardSink:
    """Writes scalars to `folder`. Raises ImportError where the package is missing.

    start_iteration: where the run resumes; TensorBoard drops what it was told of later ones before."""

    def __init__(self, folder: Path, start_iteration: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        if start_iteration > 0:
            again = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=start_iteration + 1, session_log=again))

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Record the numbers of an iteration."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = self._event(wall_time=time.time(), step=iteration, summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self, failed: bool = False) -> None:
        """Flush and close the event file."""
        self._writer.close()
