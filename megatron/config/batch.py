"""The batch triangle: global batch = micro-batch * accumulation * data parallel size; the missing member is derived."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Triangle:
    """The three members, in sequences and micro-batches."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int


@dataclass(frozen=True)
class Contradiction:
    """Members that do not fit: the key to blame first, and what to say of it."""

    key: str
    why: str
    fix: str


def complete(train: int | None, micro: int | None, accumulation: int | None, dp: int) -> Triangle | Contradiction:
    """Return the whole triangle of what is given, or why there is none.

    train: sequences of one optimizer step over all processes; micro: of one process at once; accumulation:
    micro-batches per step; dp: data parallel processes. Missing accumulation is derived before a missing micro-batch,
    and where neither is given each process computes its share at once; with nothing given, all are 1 per process.
    """
    if train is None:
        micro, accumulation = micro or 1, accumulation or 1
        return Triangle(micro * accumulation * dp, micro, accumulation)
    if micro is None:
        accumulation = accumulation or 1
        micro, rest = divmod(train, accumulation * dp)
        if rest or not micro:
            return _indivisible(train, f"gradient_accumulation_steps ({accumulation})", accumulation, dp)
    elif accumulation is None:
        accumulation, rest = divmod(train, micro * dp)
        if rest or not accumulation:
            return _indivisible(train, f"train_micro_batch_size_per_gpu ({micro})", micro, dp)
    elif micro * accumulation * dp != train:
        return Contradiction(
            "train_batch_size",
            f"it is not train_micro_batch_size_per_gpu ({micro}) x gradient_accumulation_steps ({accumulation}) x "
            f"{dp} data parallel {processes(dp)} (= {micro * accumulation * dp}).",
            f"Set train_batch_size to {micro * accumulation * dp}, or remove one of the three keys to have it derived.",
        )
    return Triangle(train, micro, accumulation)


def processes(count: int) -> str:
    """Return the noun that goes with a number of processes."""
    return "process" if count == 1 else "processes"


def _indivisible(train: int, member: str, size: int, dp: int) -> Contradiction:
    below = train // (size * dp) * size * dp
    nearest = f"{below} or {below + size * dp}" if below else f"{size * dp}"
    return Contradiction(
        "train_batch_size",
        f"it is not a multiple of {member} x {dp} data parallel {processes(dp)} (= {size * dp}).",
        f"Set train_batch_size to {nearest}.",
    )
