"""Which documents are for training, validation and test, and how many samples each part must yield.

Pure arithmetic, the same as GPT-NeoX's: `boundaries(weights, 1000)` are document numbers, and `requested_samples(...)`
follows from the length of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class RunLength:
    """How long a run is: train_iters and eval_iters in steps, train_batch_size in samples over all ranks."""

    train_iters: int
    train_batch_size: int
    eval_interval: int
    eval_iters: int


def requested_samples(run: RunLength) -> dict[str, int]:
    """Return the samples that each part must yield; GPT-NeoX's index depends on these very numbers.

    Validation: one window of eval_iters steps per interval, and one at the end of the run.
    """
    windows = run.train_iters // run.eval_interval + 1
    return {
        "train": run.train_iters * run.train_batch_size,
        "valid": windows * run.eval_iters * run.train_batch_size,
        "test": run.eval_iters * run.train_batch_size,
    }


def boundaries(weights: tuple[float, float, float], num_documents: int) -> tuple[int, int, int, int]:
    """Return the document numbers between the parts: part k holds the documents [b[k], b[k + 1]).

    b[k + 1] = b[k] + round(weight_k / sum * documents), rounding halves to even; what the last exceeds the number of
    documents by is subtracted from all but the first.
    """
    total = sum(weights)
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + round(weight / total * float(num_documents)))
    excess = ends[3] - num_documents
    return 0, ends[1] - excess, ends[2] - excess, ends[3] - excess
