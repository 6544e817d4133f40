"""The indices of `samples` and `blend` as plain loops that read like their definition; slow, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def packed_rows(
    sizes: Sequence[int], seq_length: int, seed: int, epochs: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the shuffled documents of all epochs and the (position, offset) of every sample of the stream."""
    documents = np.array(list(range(len(sizes))) * epochs)
    np.random.RandomState(seed).shuffle(documents)
    return documents.tolist(), cut_rows(sizes, documents.tolist(), seq_length)


def cut_rows(sizes: Sequence[int], documents: Sequence[int], seq_length: int) -> list[tuple[int, int]]:
    """Return (position in documents, offset) of each token k * seq_length of the stream that has a successor chunk."""
    rows = [(0, 0)]
    needed = seq_length
    passed = 0
    for position, document in enumerate(documents):
        length = sizes[document]
        while needed < passed + length:
            rows.append((position, needed - passed))
            needed += seq_length
        passed += length
    return rows


def overflow_rows(
    sizes: Sequence[int], seq_length: int, seed: int, num_samples: int, usable: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Return documents in reading order, and where each of the num_samples samples (and the one after them) begins."""
    generator = np.random.RandomState(seed)
    generator.shuffle(np.arange(num_samples))
    numbers = np.arange(len(sizes))
    documents: list[int] = []
    starts: list[int] = []
    length = 0
    while True:
        generator.shuffle(numbers)
        for number in numbers.tolist():
            if not usable[number]:
                continue
            if length == 0 or length + sizes[number] > seq_length + 1:
                starts.append(len(documents))
                length = 0
            documents.append(number)
            length += sizes[number]
            if len(starts) > num_samples:
                return documents, starts


def blend_choices(weights: Sequence[float], num_samples: int) -> list[int]:
    """Return the data set of each sample: the first of those that lag behind their share the most."""
    taken = [0] * len(weights)
    choices = []
    for number in range(num_samples):
        lags = [weight * max(number, 1) - count for weight, count in zip(weights, taken, strict=True)]
        choice = lags.index(max(lags))
        choices.append(choice)
        taken[choice] += 1
    return choices
