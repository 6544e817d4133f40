"""Messages to a person: `info` from rank 0 only, warnings and errors from every rank with its coordinates.

Use `logger = logs.get_logger(__name__)`; `logs.setup(rank, coordinates)` is called once per process by
the launcher. Before that (in a REPL, in tools) the process counts as rank 0. Warnings name the step that
`whereabouts` knows of.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from megatron import whereabouts

_ROOT = "deepy"


class _RankFilter(logging.Filter):
    """Lets everything pass on rank 0, and warnings and worse on the other ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or record.levelno >= logging.WARNING


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment, so that messages pass above a live progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(logging.Formatter):
    """Plain text for information; `[warning rank 3 dp1 tp1 step 12]` before anything worse."""

    def __init__(self, coordinates: str) -> None:
        super().__init__()
        self.coordinates = coordinates

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        if record.levelno < logging.WARNING:
            return message
        iteration = whereabouts.current().step
        step = "" if iteration is None else f"step {iteration}"
        return f"[{' '.join(filter(None, (record.levelname.lower(), self.coordinates, step)))}] {message}"


def setup(rank: int = 0, coordinates: str = "", level: str | None = None) -> None:
    """Route all messages of this process to stderr.

    rank: global rank; only rank 0 prints information.
    coordinates: shown before warnings and errors, such as "rank 3 host n1"; "" for a single process.
    level: a logging level's name; None takes the environment's LOGLEVEL, or INFO.
    """
    handler = _StderrHandler()
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(_Formatter(coordinates))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.propagate = False
    wanted = (level or os.environ.get("LOGLEVEL") or "INFO").upper()
    root.setLevel(wanted if wanted in logging.getLevelNamesMapping() else "INFO")


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; call it with `__name__`."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        setup()
    return root.getChild(name.removeprefix("megatron."))
