"""Bias, dropout and residual: y = r + keep * (x + b) / (1 - p), where keep is 0 with probability p and else 1.

Which elements are kept is a function of a seed, so that recomputation keeps the same ones and no mask is stored. The
stream is Philox 4x32 with 7 rounds (Salmon et al. 2011), key = seed, counter = (column mod q, row, 0, 0) for
q = ceil(h / 4); word (column div q) decides: an element is kept where its word is p * 2^32 or more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def add_dropped(
    hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor | None = None
) -> Tensor:
    """Return residual + dropout(hidden + bias) for hidden and residual [..., h].

    seed: [1] int64, or None to draw from the device's generator.
    """
    if seed is not None:
        return add_dropped_reference(hidden, bias, residual, probability, seed)
    return residual + F.dropout(hidden if bias is None else hidden + bias, probability)


def add_dropped_reference(
    hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor
) -> Tensor:
    """The formula of `add_dropped`, with the mask that the seed stands for."""
    keep = kept(hidden.shape[:-1].numel(), hidden.shape[-1], probability, seed).view(hidden.shape)
    values = hidden.float() if bias is None else hidden.float() + bias.float()
    return (residual.float() + values * keep / (1 - probability)).to(hidden.dtype)


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed [1] int64 from the device's generator, which recomputation finds as it was."""
    return torch.randint(1 << 62, (1,), device=device)


def threshold(probability: float) -> int:
    """Return the smallest word that keeps an element."""
    return min(int(probability * 2.0**32), _WORD)


def kept(rows: int, columns: int, probability: float, seed: Tensor) -> Tensor:
    """Return [rows, columns] bool: which elements the seed keeps."""
    quarter = -(-columns // 4)
    words = philox(
        torch.arange(quarter, device=seed.device).expand(rows, quarter),
        torch.arange(rows, device=seed.device).unsqueeze(1).expand(rows, quarter),
        seed,
    )
    return torch.cat(words, dim=1)[:, :columns] >= threshold(probability)


def philox(column: Tensor, row: Tensor, seed: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of counters (column, row, 0, 0), as int64 in [0, 2^32), for seed [1] int64."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    first, second, third, fourth = column, row, torch.zeros_like(column), torch.zeros_like(column)
    for _ in range(rounds):
        upper_a, lower_a = _product(first, _MULTIPLIERS[0])
        upper_b, lower_b = _product(third, _MULTIPLIERS[1])
        first, second, third, fourth = upper_b ^ second ^ low, lower_b, upper_a ^ fourth ^ high, lower_a
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return first, second, third, fourth


def _product(values: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits of values * factor, both in [0, 2^32), without overflow of int64."""
    low, high = values & 0xFFFF, values >> 16
    low, high = low * factor, high * factor
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
