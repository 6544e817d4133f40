"""From logits to the next token: temperature, then top-k, then top-p, then one draw per row.

All functions are pure. Randomness enters as one uniform number per row, from a stream of its own for each prompt, so
that what a prompt gets does not depend on its neighbours in the batch or on the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.rng import hash_seed


@dataclass(frozen=True)
class SamplingSettings:
    """temperature: the logits are divided by it; 0 leaves them as they are.
    top_k: only the k likeliest tokens; 0: all.
    top_p: only the likeliest tokens whose probabilities first reach this sum (Holtzman et al. 2019); 0 or 1: all.

    With all three 0 the likeliest token is taken.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return not (self.temperature or self.top_k or self.top_p)


class Draws:
    """One stream of uniform numbers for each row.

    seed: of the run. names: one text per row, such as the prompt and its number; equal names draw equally.
    """

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self._streams = [torch.Generator().manual_seed(hash_seed(seed, "sample", name)) for name in names]

    def next(self) -> Tensor:
        """Return the next uniform number in [0, 1) of every row, [b] float64 on the CPU."""
        return torch.stack([torch.rand((), generator=stream, dtype=torch.float64) for stream in self._streams])


def choose(logits: Tensor, settings: SamplingSettings, draws: Draws) -> Tensor:
    """Return the next token of every row, [b] int64, from logits [b, v] in any dtype."""
    if settings.is_greedy:
        return logits.argmax(dim=-1)
    logits = logits.float()
    if settings.temperature:
        logits = logits / settings.temperature
    logits = keep_top_p(keep_top_k(logits, settings.top_k), settings.top_p)
    return draw(logits.softmax(dim=-1), draws.next().to(logits.device))


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Return logits [b, v] with all but the k largest of each row at -inf; 0 keeps all. Ties with the k-th stay."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Return logits [b, v] with -inf outside the smallest set of likeliest tokens whose probabilities reach top_p.

    The likeliest token always stays; 0 and 1 keep all.
    """
    if not 0 < top_p < 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = (before >= top_p).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, float("-inf"))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return a token [b] for each row of probabilities [b, v], where its cumulative sum first passes uniform [b].

    A token of probability 0 is never returned.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last = probabilities.shape[-1] - 1 - probabilities.flip(-1).gt(0).int().argmax(dim=-1)
    return torch.minimum(tokens, last)
