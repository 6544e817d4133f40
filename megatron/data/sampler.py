"""Which samples a rank reads: pure arithmetic on `consumed_samples`, the only thing a resumed run must know.

Optimizer step t of a run takes the samples t * T .. (t + 1) * T - 1 in order, T the samples of a step over all ranks.
Within a step, micro-batch g takes B = micro_batch * dp_size of them, and data-parallel rank r a contiguous slice of
those. Whole micro-batches make up an epoch; what is left over at its end is dropped, then the first sample follows.
Source: the order of GPT-NeoX, resumed runs included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Layout:
    """How a step is spread: samples per micro-batch and rank, this rank, ranks, micro-batches per step."""

    micro_batch: int
    dp_rank: int = 0
    dp_size: int = 1
    gradient_accumulation_steps: int = 1

    @property
    def micro_batch_samples(self) -> int:
        """Samples of one micro-batch over all ranks."""
        return self.micro_batch * self.dp_size

    @property
    def step_samples(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch_samples * self.gradient_accumulation_steps

    def epoch_samples(self, num_samples: int) -> int:
        """Samples of an epoch of a data set of `num_samples`; all of them where they do not fill a micro-batch."""
        return num_samples // self.micro_batch_samples * self.micro_batch_samples or num_samples

    def indices(self, consumed_samples: int, micro_batch_number: int, num_samples: int) -> NDArray[np.int64]:
        """Return the sample indices [micro_batch] of one micro-batch of the step that begins at `consumed_samples`."""
        first = consumed_samples + micro_batch_number * self.micro_batch_samples + self.dp_rank * self.micro_batch
        return (first + np.arange(self.micro_batch, dtype=np.int64)) % self.epoch_samples(num_samples)
