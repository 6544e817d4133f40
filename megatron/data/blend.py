"""Several data sets as one: each sample is taken from the data set that lags behind its share the most.

The choice is sequential by definition: sample i comes from the first k that maximises w_k * max(i, 1) - taken_k. It is
computed in parallel all the same, exactly: the range is cut into lanes that run side by side, each beginning a little
early from a guess of what was taken; two runs of this rule soon meet. A lane whose beginning was not met is run again
from the right one, so the result never depends on the guess.

Source: GPT-NeoX's blending, float64 comparison included; `megatron.data.plain.blend_choices` is its loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.gpt import Origin, SampleReader, Samples

OVERSAMPLING = 1.005
BLOCK = 1024
WARMUP = 64
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BlendIndex:
    """choices: [n] the data set of each sample. taken: [blocks, k] int64 samples taken of each before each block."""

    choices: NDArray[Any]
    taken: NDArray[np.int64]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The two arrays by name."""
        return {"choices": self.choices, "taken": self.taken}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> BlendIndex:
        """The index that `arrays()` came from."""
        return cls(**arrays)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the data set of sample `index` and the number of the sample in it."""
        choice = int(self.choices[index])
        block = index // BLOCK
        inside = np.count_nonzero(self.choices[block * BLOCK : index] == choice)
        return choice, int(self.taken[block, choice]) + int(inside)


class BlendedDataset:
    """The samples of several data sets, mixed as `index` says."""

    def __init__(self, datasets: Sequence[SampleReader], index: BlendIndex) -> None:
        self.datasets = datasets
        self.index = index

    def __len__(self) -> int:
        return self.index.choices.size

    def read(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices` [b], in their order; a data set that ends begins again."""
        located = self._locate(indices)
        parts = []
        for choice in np.unique(located[:, 0]).tolist():
            rows = np.flatnonzero(located[:, 0] == choice)
            parts.append((rows, self.datasets[choice].read(located[rows, 1])))
        if len(parts) == 1:
            return parts[0][1]
        width = parts[0][1].text.shape[1]
        text = np.empty((len(indices), width), np.int64)
        has_labels = any(samples.labels is not None for _, samples in parts)
        labels = np.empty_like(text) if has_labels else None
        for rows, samples in parts:
            text[rows] = samples.text
            if labels is not None:
                labels[rows] = samples.text if samples.labels is None else samples.labels
        return Samples(text, labels)

    def origins(self, indices: NDArray[np.int64]) -> list[Origin]:
        """Return where the samples at `indices` [b] were taken from."""
        located = self._locate(indices)
        return [self.datasets[choice].origins(located[row : row + 1, 1])[0] for row, (choice, _) in enumerate(located)]

    def _locate(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [b, 2]: the data set of each sample, and its number in it."""
        return np.array([self.index.locate(index) for index in (indices % len(self)).tolist()], np.int64)


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]


def requested_per_dataset(num_samples: int, weights: Sequence[float]) -> list[int]:
    """The samples to ask of each data set, half a percent more than its share, for normalised weights."""
    return [math.ceil(num_samples * weight * OVERSAMPLING) for weight in weights]


def weights_by_documents(counts: Sequence[int], alpha: float, neox_compat: bool = False) -> list[float]:
    """Return weights in proportion to (documents_k / all documents) ** alpha: 1 is natural, towards 0 uniform.

    neox_compat: GPT-NeoX's own formula, which multiplies by 1 - documents_k / all documents.
    Source: multilingual sampling, arXiv:1901.07291 section 3.1.
    """
    shares = np.array(normalised(counts))
    weights = np.array(normalised(list(shares**alpha)))
    if neox_compat and len(counts) > 1:
        weights = weights * (1 - shares)
    return normalised(weights.tolist())


def blend_index(weights: Sequence[float], num_samples: int, lanes: int | None = None) -> BlendIndex:
    """Return which data set each of `num_samples` samples comes from. Memory: a byte per sample (two from 256 sets).

    weights: normalised. lanes: how many ranges to run side by side, None chooses.
    """
    choices = _choices(np.array(weights), num_samples, lanes or max(1, math.isqrt(num_samples) // 4))
    blocks = [
        np.bincount(choices[begin : begin + BLOCK], minlength=len(weights)) for begin in range(0, num_samples, BLOCK)
    ]
    taken = np.zeros((len(blocks) + 1, len(weights)), np.int64)
    np.cumsum(np.array(blocks).reshape(-1, len(weights)), axis=0, out=taken[1:])
    return BlendIndex(choices, taken)


def _choices(weights: Floats, num_samples: int, lanes: int) -> NDArray[Any]:
    """Choose for all samples; the lanes have `length` samples each, the last ones of them may lie past the end."""
    length = -(-num_samples // lanes)
    begins = np.arange(lanes) * length
    warmup = min(WARMUP, length)
    early = np.maximum(begins - warmup, 0)
    starts = _guess(weights, early)
    _run(weights, early[1:], starts[:, 1:], warmup)
    choices = np.empty((length, lanes), np.uint8 if weights.size <= 256 else np.uint16)
    ends = starts.copy()
    stale = np.arange(lanes)
    while stale.size:
        ends[:, stale] = starts[:, stale]
        piece = ends[:, stale]
        choices[:, stale] = _run(weights, begins[stale], piece, length)
        ends[:, stale] = piece
        stale = 1 + np.flatnonzero((starts[:, 1:] != ends[:, :-1]).any(axis=0))
        starts[:, stale] = ends[:, stale - 1]
    return choices.T.reshape(-1)[:num_samples]


def _guess(weights: Floats, numbers: NDArray[np.int64]) -> Floats:
    """Roughly what was taken [k, lanes] before each of the samples `numbers`: the shares, rounded to the right sum."""
    exact = weights[:, None] * numbers
    taken = np.floor(exact)
    missing = numbers - taken.sum(axis=0)
    ranks = np.argsort(np.argsort(taken - exact, axis=0, kind="stable"), axis=0)
    return taken + (ranks < missing)


def _run(weights: Floats, begins: NDArray[np.int64], taken: Floats, length: int) -> NDArray[Any]:
    """Run the rule `length` steps from each of `begins`, updating `taken` [k, lanes]; return [length, lanes]."""
    choices = np.empty((length, begins.size), np.uint8 if weights.size <= 256 else np.uint16)
    for step in range(length):
        numbers = np.maximum(begins + step, 1).astype(np.float64)
        best = weights[0] * numbers - taken[0]
        choice = choices[step]
        choice[:] = 0
        for k in range(1, weights.size):
            lag = weights[k] * numbers - taken[k]
            choice[lag > best] = k
            np.maximum(best, lag, out=best)
        for k in range(weights.size):
            taken[k] += choice == k
    return choices
