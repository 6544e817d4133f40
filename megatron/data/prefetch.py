"""Batches brought to a GPU while it computes: the next step's are copied on a stream of their own.

The order of the data and `consumed_samples` are the loader's: what is fetched ahead is not consumed yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron.data.batch import Batch
from megatron.data.loaders import MicroBatchSamples


class Steps(Protocol):
    """The batches of each step; see `megatron.data.loaders.BatchLoader`."""

    consumed_samples: int

    def __next__(self) -> list[Batch]: ...

    def seek(self, consumed_samples: int) -> None:
        """Continue at `consumed_samples`."""
        ...

    def read_step(self, consumed_samples: int) -> list[Batch]:
        """Return the batches of the step that begins there; where the next step begins stays as it is."""
        ...

    def describe_step(self, consumed_samples: int) -> list[MicroBatchSamples]:
        """Return what the step that begins there is made of, on all data parallel ranks."""
        ...


@dataclass(frozen=True)
class _Fetched:
    """A step's batches on the device, or why they could not be read; consumed_samples: when they are taken."""

    batches: list[Batch]
    consumed_samples: int
    error: Exception | None = None


class Prefetcher:
    """The steps of `loader` on `device`, one of them ahead."""

    def __init__(self, loader: Steps, device: torch.device) -> None:
        self.consumed_samples = loader.consumed_samples
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: _Fetched | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Return the next step's batches, and begin to copy those of the step behind it.

        What reading them raised is raised when they are taken."""
        taken = self._next or self._fetch()
        self._next = None
        if taken.error is not None:
            raise taken.error
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for batch in taken.batches:
                batch.record_stream(current)
        self.consumed_samples = taken.consumed_samples
        self._next = self._fetch()
        return taken.batches

    def seek(self, consumed_samples: int) -> None:
        """Continue at `consumed_samples`; what was fetched is dropped."""
        self._next = None
        self._loader.seek(consumed_samples)
        self.consumed_samples = consumed_samples

    def read_step(self, consumed_samples: int) -> list[Batch]:
        """Return the batches of the step that begins there, not on the device."""
        return self._loader.read_step(consumed_samples)

    def describe_step(self, consumed_samples: int) -> list[MicroBatchSamples]:
        """Return what a step is made of; see `Steps`."""
        return self._loader.describe_step(consumed_samples)

    def _fetch(self) -> _Fetched:
        try:
            batches = next(self._loader)
        except Exception as error:
            return _Fetched([], self._loader.consumed_samples, error)
        with torch.cuda.stream(self._stream):  # of None: does nothing
            return _Fetched([batch.to(self._device) for batch in batches], self._loader.consumed_samples)


def on_device(loader: Steps, device: torch.device) -> Steps:
    """Return the loader's steps on the device: on a CPU the loader itself."""
    return Prefetcher(loader, device) if device.type == "cuda" else loader
