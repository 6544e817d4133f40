"""Where numbers go besides the run's own folder: the one protocol of all sinks, and the guard around each.

A sink that fails, at its start or later, is reported once and left alone: it never stops training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from megatron import logs

logger = logs.get_logger(__name__)


class Sink(Protocol):
    """Takes numbers by GPT-NeoX's names: `train/lm_loss`, `validation/lm_loss`, `runtime/samples_per_sec` ..."""

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Record the numbers of an iteration."""
        ...

    def close(self, failed: bool = False) -> None:
        """Send what is left and close. failed: the run ended by an error."""
        ...


class GuardedSink:
    """A sink that warns once and falls silent when it fails.

    name: for the warning. open_sink: makes the sink; called at once, and its exceptions are guarded too.
    install: what to run where a package is missing.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], install: str) -> None:
        self.name = name
        self._sink: Sink | None = None
        try:
            self._sink = open_sink()
        except ImportError as error:
            logger.warning(f"{name}: {error}. Nothing is sent there. To have it: {install}")
        except Exception as error:
            self._give_up(error)

    @property
    def is_open(self) -> bool:
        """Whether numbers still go there."""
        return self._sink is not None

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Record the numbers of an iteration."""
        if self._sink is None:
            return
        try:
            self._sink.write(scalars, iteration)
        except Exception as error:
            self._give_up(error)

    def close(self, failed: bool = False) -> None:
        """Send what is left and close."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            sink.close(failed)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._sink = None
        logger.warning(
            f"{self.name} failed and gets no more numbers; training goes on. {type(error).__name__}: {error}"
        )
