"""Batches of one rank, a step at a time, read ahead by threads.

    loader = BatchLoader(dataset, micro_batch=4, dp_rank=0, dp_size=1, gas=2, consumed_samples=0)
    for batches in loader:             # endless: a list of `gas` Batches per optimizer step
        ...
    loader.consumed_samples            # all that a checkpoint needs; a new loader starts there in O(1)

Threads suffice because reading is numpy on memory maps. A step's batches are a pure function of its position, so the
threads share nothing, and what goes wrong in one is raised where the step is taken.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.data.gpt import Origin, SampleReader, Samples
from megatron.data.sampler import Layout
from megatron.errors import ConfigError, Problem

Step = list[Batch]


@dataclass(frozen=True)
class MicroBatchSamples:
    """What one micro-batch of one data parallel rank is made of: the indices of its samples in the data set, and
    where each was taken from."""

    dp_rank: int
    number: int
    indices: list[int]
    origins: list[Origin]


class BatchLoader:
    """The optimizer steps of one data-parallel rank, from `consumed_samples` on, for ever.

    dataset: what yields the samples. micro_batch, dp_rank, dp_size, gas: the layout (samples, ranks, micro-batches).
    consumed_samples: samples that the run has trained on before, over all ranks.
    eod_token: the end-of-document id whose successors do not count in the loss (eod_mask_loss), or None.
    num_workers: threads that read ahead, two steps each; 0 reads when asked.
    pin_memory: page-locked tensors, from which copies to a GPU do not block.
    """

    def __init__(
        self,
        dataset: SampleReader,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        gas: int = 1,
        consumed_samples: int = 0,
        *,
        eod_token: int | None = None,
        num_workers: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.layout = Layout(micro_batch, dp_rank, dp_size, gas)
        self.consumed_samples = consumed_samples
        self._eod_token = eod_token
        self._pin_memory = pin_memory
        self._read_ahead = 2 * num_workers
        self._threads = ThreadPoolExecutor(num_workers, "batches") if num_workers else None
        self._steps: Iterator[Step] | None = None

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Step:
        """Return the next step's batches, `gas` of them, and count its samples as consumed."""
        if self._steps is None:
            self._steps = self._stream(itertools.count(self.consumed_samples, self.layout.step_samples))
        step = next(self._steps)
        self.consumed_samples += self.layout.step_samples
        return step

    def seek(self, consumed_samples: int) -> None:
        """Continue at `consumed_samples`; nothing is read to get there."""
        self._drop_steps()
        self.consumed_samples = consumed_samples

    def window(self, first_step: int, num_steps: int) -> Iterator[Step]:
        """Yield the steps [first_step, first_step + num_steps) of the data set, whatever was consumed before."""
        size = self.layout.step_samples
        return self._stream(range(first_step * size, (first_step + num_steps) * size, size))

    def close(self) -> None:
        """Stop reading ahead and end the threads; the loader cannot be used after it."""
        self._drop_steps()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def read_step(self, consumed_samples: int) -> Step:
        """Return the batches of the step that begins at `consumed_samples`."""
        numbers = range(self.layout.gradient_accumulation_steps)
        return [self._read(self.layout.indices(consumed_samples, number, len(self.dataset))) for number in numbers]

    def describe_step(self, consumed_samples: int) -> list[MicroBatchSamples]:
        """Return what the step that begins at `consumed_samples` is made of, on all data parallel ranks."""
        found = []
        for dp_rank in range(self.layout.dp_size):
            layout = replace(self.layout, dp_rank=dp_rank)
            for number in range(layout.gradient_accumulation_steps):
                indices = layout.indices(consumed_samples, number, len(self.dataset))
                found.append(MicroBatchSamples(dp_rank, number, indices.tolist(), self.dataset.origins(indices)))
        return found

    def _read(self, indices: NDArray[np.int64]) -> Batch:
        return make_batch(self.dataset.read(indices), self._eod_token, self._pin_memory)

    def _drop_steps(self) -> None:
        self._steps = None  # closing the generator cancels what it has asked for

    def _stream(self, positions: Iterable[int]) -> Iterator[Step]:
        """Yield the steps at `positions` in order, at most `_read_ahead` of them read in advance."""
        if self._threads is None:
            yield from map(self.read_step, positions)
            return
        pending: deque[Future[Step]] = deque()
        remaining = iter(positions)
        try:
            for position in itertools.islice(remaining, self._read_ahead):
                pending.append(self._threads.submit(self.read_step, position))
            while pending:
                step = pending.popleft().result()
                for position in itertools.islice(remaining, 1):
                    pending.append(self._threads.submit(self.read_step, position))
                yield step
        finally:
            for future in pending:
                future.cancel()


def make_batch(samples: Samples, eod_token: int | None = None, pin_memory: bool = False) -> Batch:
    """Return the batch of `samples` [b, s + 1]: inputs are all but the last column, labels all but the first.

    The loss counts where the label is not negative and, with `eod_token`, the input is not that token: what follows
    the end of a document is the beginning of an unrelated one.
    """
    text = torch.from_numpy(samples.text)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    loss_mask = torch.ones(tokens.shape)
    if samples.labels is not None:
        labels = torch.from_numpy(samples.labels)[:, 1:].clamp(min=0)
        loss_mask = torch.from_numpy(samples.labels[:, 1:] >= 0).float()
    if eod_token is not None:
        loss_mask *= tokens != eod_token
    batch = (tokens, labels, loss_mask)
    return Batch(*(_pin(tensor) for tensor in batch)) if pin_memory else Batch(*batch)


def _pin(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()


def build_loader(
    config: Config,
    dataset: SampleReader,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    consumed_samples: int = 0,
    eod_token: int | None = None,
) -> BatchLoader:
    """Return the loader of `dataset` with the layout and options of `config`.

    eod_token: the tokenizer's end-of-document id; used where eod_mask_loss is set.
    Raises ConfigError where eod_mask_loss is set and the tokenizer has no such id.
    """
    if config.training.eod_mask_loss and eod_token is None:
        why = "the tokenizer has no end-of-document token."
        raise ConfigError(Problem(what="eod_mask_loss = true", why=why, fix="Set eod_mask_loss: false."))
    return BatchLoader(
        dataset,
        config.batch.train_micro_batch_size_per_gpu,
        dp_rank,
        dp_size,
        config.batch.gradient_accumulation_steps,
        consumed_samples,
        eod_token=eod_token if config.training.eod_mask_loss else None,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
