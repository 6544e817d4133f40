"""Random streams that are a function of where we are, so that none has to be saved.

Before each micro-batch torch's default generator is seeded with a hash of
(seed, iteration, micro_batch, replica, pp stage). A run that resumes at iteration N draws exactly what the run
that never stopped drew, bit by bit, and tensor-parallel ranks share the stream, as their activations are equal.

Where each rank has a share of its own (attention probabilities of its heads, tokens of its part of the sequence), it
draws inside `forked_stream`: the shared CPU stream yields one number on every rank alike, from which, and from the
rank, the fork is seeded. So a fork too is a function of (seed, iteration, micro-batch, place in the model, rank), and
whoever restores the default generators, as recomputation does, gets the same forks again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
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
        place = (self.mesh.replicas.rank, self.mesh.pp.rank)
        torch.manual_seed(hash_seed(self.seed, "micro_batch", iteration, micro_batch, *place))


@contextmanager
def forked_stream(rank: int, device: torch.device) -> Iterator[None]:
    """Draw from a stream of this rank's own inside; afterwards the default generators are as on all other ranks.

    rank: place on the tensor axis. device: where the draws inside happen. The GPU does not wait for it.
    """
    number = int(torch.randint(2**62, (), device="cpu"))
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(hash_seed(number, "fork", rank))
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that torch's own functions draw from on a device."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator
