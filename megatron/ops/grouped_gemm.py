"""Matrix products of groups of rows, each with a matrix of its own: the experts of a mixture (Gale et al. 2022).

    y[o[e] : o[e + 1]] = x[o[e] : o[e + 1]] W[e]

The tokens are sorted by expert; groups may be empty, and of any size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def grouped_matmul(inputs: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return [t, f] from inputs [t, h], weights [e, h, f] and offsets [e + 1] int64, the first 0 and the last t.

    The formula, one product for each expert; it reads the offsets on the host.
    """
    bounds = offsets.tolist()
    groups = [inputs[start:stop] for start, stop in pairwise(bounds)]
    return torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])
