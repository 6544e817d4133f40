"""Which documents are for training, validation and test, and how many samples each part must yield.

Pure arithmetic, the same as GPT-NeoX's for every string it accepts: `parse_split("969, 30, 1")` are weights,
`boundaries(weights, 1000)` are document numbers, and `requested_samples(...)` follows from the length of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError, Problem

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


def parse_split(split: str) -> tuple[float, float, float]:
    """Return the weights of train, valid and test from `969, 30, 1`, `90/5/5` or `100`; they need not sum to 1.

    Raises ConfigError for anything but one to three numbers of which none is negative and the first is positive.
    """
    separator = "," if "," in split else "/"
    try:
        weights = [float(piece) for piece in split.split(separator)]
    except ValueError:
        raise _split_error(split, "is not a list of numbers.") from None
    if len(weights) > 3:
        raise _split_error(split, f"has {len(weights)} numbers; there are three parts: train, valid, test.")
    if not all(0 <= weight < float("inf") for weight in weights):
        raise _split_error(split, "holds a number that is negative or not finite.")
    if weights[0] == 0:
        raise _split_error(split, "leaves nothing to train on: its first number is 0.")
    train, valid, test = [*weights, 0.0, 0.0][:3]
    return train, valid, test


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


def _split_error(split: str, why: str) -> ConfigError:
    return ConfigError(Problem(what=f'split = "{split}"', why=why, fix='Write for example split: "969, 30, 1".'))
