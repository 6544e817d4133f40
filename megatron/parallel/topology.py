"""Which rank sits where: global rank <-> (pipe, data, model), in plain integers and without torch.

The pipe axis is outermost, data in the middle, model innermost, so that the ranks of one tensor-parallel
group are neighbours on one machine:

    rank = pipe * (dp * tp) + data * tp + model
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron.errors import LaunchError, Problem


class Coordinate(NamedTuple):
    """A rank's place on each axis, counted from 0."""

    pipe: int
    data: int
    model: int


@dataclass(frozen=True)
class Topology:
    """The sizes of the three axes; their product is the number of processes."""

    pp: int
    dp: int
    tp: int

    @property
    def world_size(self) -> int:
        """Number of processes in the run."""
        return self.pp * self.dp * self.tp

    @classmethod
    def from_world(cls, world_size: int, tp: int = 1, pp: int = 1) -> Topology:
        """Return the topology of `world_size` processes; the data axis takes what tp and pp leave.

        Raises LaunchError where world_size is not a multiple of tp * pp.
        """
        if tp < 1 or pp < 1 or world_size < 1 or world_size % (tp * pp):
            raise LaunchError(
                Problem(
                    what=f"model_parallel_size = {tp}, pipe_parallel_size = {pp}",
                    why=f"{world_size} processes cannot be divided into groups of {tp} * {pp} = {tp * pp}.",
                    fix=f"Start a multiple of {max(1, tp * pp)} processes, or lower the two sizes.",
                )
            )
        return cls(pp=pp, dp=world_size // (tp * pp), tp=tp)

    def rank(self, coordinate: Coordinate) -> int:
        """Return the global rank at a coordinate."""
        return (coordinate.pipe * self.dp + coordinate.data) * self.tp + coordinate.model

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate of a global rank in [0, world_size)."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in [0, {self.world_size})")
        rest, model = divmod(rank, self.tp)
        pipe, data = divmod(rest, self.dp)
        return Coordinate(pipe=pipe, data=data, model=model)

    def groups(self, axis: str) -> list[list[int]]:
        """Return the rank lists of every group along `axis` ("pipe", "data" or "model").

        Each rank is in exactly one list, and the lists are in the same order on every rank, as
        `torch.distributed.new_group` demands.
        """
        groups: dict[Coordinate, list[int]] = {}
        for rank in range(self.world_size):
            origin = self.coordinate(rank)._replace(**{axis: 0})
            groups.setdefault(origin, []).append(rank)
        return list(groups.values())
