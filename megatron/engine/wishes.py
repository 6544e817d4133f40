"""What a rank wishes of the loop, told to all ranks by the sum that a step or a validation batch makes anyway.

A wish is one more number of that sum: how many ranks have it. So telling costs no collective and no waiting for the
device, and all ranks hear the same of the same step, whoever wishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Wish(StrEnum):
    """What a rank may wish; all but SAVE are reasons to stop, and that one asks for a checkpoint and goes on."""

    SAVE = "save"
    SIGTERM = "SIGTERM"
    SIGUSR1 = "SIGUSR1"
    WALL_TIME = "max_wall_time"
    SLURM_END = "the end of the Slurm job"


Wishes = frozenset[Wish]
Ask = Callable[[], Collection[Wish]]
"""Returns what this rank wishes now; an engine calls it once for each step."""
NONE: Wishes = frozenset()
_WISHES = tuple(Wish)


def nothing() -> Wishes:
    """Wish nothing."""
    return NONE


def message(totals: Sequence[Tensor | float], wishes: Collection[Wish]) -> Tensor:
    """Return `totals` and this rank's wishes as one vector, fp64, to be summed over all ranks.

    totals: scalars, the first one on the device, where the vector will be too. Nothing comes there from the host but
    by filling, so that nobody waits for the device."""
    device = totals[0].device if isinstance(totals[0], Tensor) else None
    vector = torch.zeros(len(totals) + len(_WISHES), dtype=torch.float64, device=device)
    for place, total in enumerate(totals):
        if isinstance(total, Tensor):
            vector[place] = total
        elif total:
            vector[place].fill_(total)
    for wish in wishes:
        vector[len(totals) + _WISHES.index(wish)].fill_(1.0)
    return vector


def counts(vector: Tensor) -> dict[str, Tensor]:
    """Return how many ranks have each wish, from the sum of their messages."""
    return dict(zip(map(_key, _WISHES), vector[-len(_WISHES) :], strict=True))


def own_counts(wishes: Collection[Wish]) -> dict[str, float]:
    """Return what `counts` would of a process that is alone, without any tensor."""
    return {_key(wish): float(wish in wishes) for wish in _WISHES}


def heard(numbers: Mapping[str, float]) -> Wishes:
    """Return what at least one rank wishes. numbers: hold the counts, now that they are known."""
    return frozenset(wish for wish in _WISHES if numbers[_key(wish)] > 0)


def _key(wish: Wish) -> str:
    return f"wish {wish.name}"
