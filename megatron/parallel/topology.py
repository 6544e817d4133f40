"""Which rank sits where: global rank <-> (pipe, data, context, model), in plain integers and without torch.

The pipe axis is outermost, then data, then context, and model innermost, so that the ranks of one tensor-parallel
group are neighbours on one machine, and those that share a sequence come next:

    rank = ((pipe * dp + data) * cp + context) * tp + model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron.config.batch import processes
from megatron.errors import LaunchError, Problem


class Coordinate(NamedTuple):
    """A rank's place on each axis, counted from 0."""

    pipe: int
    data: int
    context: int
    model: int


@dataclass(frozen=True)
class Topology:
    """The sizes of the axes; their product is the number of processes."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes in the run."""
        return self.pp * self.dp * self.cp * self.tp

    @classmethod
    def from_world(cls, world_size: int, tp: int = 1, pp: int = 1, cp: int = 1) -> Topology:
        """Return the topology of `world_size` processes; the data axis takes what the others leave.

        Raises LaunchError where world_size is not a multiple of tp * pp * cp.
        """
        per_model, noun = tp * pp * cp, processes(world_size)
        if min(tp, pp, cp, world_size) < 1 or world_size % per_model:
            raise LaunchError(
                Problem(
                    what=f"model_parallel_size = {tp}, pipe_parallel_size = {pp}, context_parallel_size = {cp}",
                    why=f"{world_size} {noun} cannot be divided into groups of {tp} * {pp} * {cp} = {per_model}.",
                    fix=f"Start a multiple of {max(1, per_model)} processes, or lower one of the sizes.",
                )
            )
        return cls(pp=pp, dp=world_size // per_model, cp=cp, tp=tp)

    def rank(self, coordinate: Coordinate) -> int:
        """Return the global rank at a coordinate."""
        place = (coordinate.pipe * self.dp + coordinate.data) * self.cp + coordinate.context
        return place * self.tp + coordinate.model

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate of a global rank in [0, world_size)."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in [0, {self.world_size})")
        rest, model = divmod(rank, self.tp)
        rest, context = divmod(rest, self.cp)
        pipe, data = divmod(rest, self.dp)
        return Coordinate(pipe=pipe, data=data, context=context, model=model)

    def groups(self, *axes: str) -> list[list[int]]:
        """Return the rank lists of every group along `axes` ("pipe", "data", "context", "model").

        Ranks of one list differ in these axes only, and are in ascending order. Each rank is in exactly one list,
        and the lists are in the same order on every rank, as `torch.distributed.new_group` demands.
        """
        return self._partition(lambda place: place._replace(**dict.fromkeys(axes, 0)))

    def replicas(self) -> list[list[int]]:
        """Return the groups of ranks that hold the same parameters: all of the data and context axes."""
        return self.groups("data", "context")

    def expert_groups(self, ep: int) -> list[list[int]]:
        """Return the groups of `ep` ranks that share a layer's experts: neighbours among replicas.

        Raises LaunchError where the replicas are not a multiple of ep.
        """
        if ep < 1 or self.dp * self.cp % ep:
            raise LaunchError(
                Problem(
                    what=f"moe_expert_parallel_size = {ep}",
                    why=f"the {self.dp * self.cp} ranks with the same parameters cannot be divided into such groups.",
                    fix="Set it to a divisor of that number.",
                )
            )
        return self._partition(
            lambda place: place._replace(data=0, context=(place.data * self.cp + place.context) // ep)
        )

    def _partition(self, origin: Callable[[Coordinate], Coordinate]) -> list[list[int]]:
        groups: dict[Coordinate, list[int]] = {}
        for rank in range(self.world_size):
            groups.setdefault(origin(self.coordinate(rank)), []).append(rank)
        return list(groups.values())
