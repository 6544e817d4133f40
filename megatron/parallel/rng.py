"""Random streams that are a function of where we are, so that none has to be saved.

Before each micro-batch torch's default generator is seeded with a hash of
(seed, iteration, micro_batch, dp rank, pp stage). A run that resumes at iteration N draws exactly what the run
that never stopped drew, bit by bit, and tensor-parallel ranks share the stream, as their activations are equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from megatron.parallel.mesh import Mesh


def hash_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) from the sha256 of the parts; equal on every machine and Python version."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class RngStreams:
    """The streams of one rank of a run with this seed."""

    seed: int
    mesh: Mesh

    def start_micro_batch(self, iteration: int, micro_batch: int) -> None:
        """Seed torch's default generator (CPU and the mesh's device) for one micro-batch.

        iteration: optimizer steps done so far; micro_batch: its index within the step.
        """
        place = (self.mesh.dp.rank, self.mesh.pp.rank)
        torch.manual_seed(hash_seed(self.seed, "micro_batch", iteration, micro_batch, *place))
