"""The process mesh as a value: for each axis its size, this process's rank on it, and its process group.

Whoever needs a group is given the Mesh (or one Axis); no group is a global. `Mesh.single()` needs no
torch.distributed, so every module can be built in a REPL:

    model = SequentialModel(build_plans(config, 50304, Mesh.single()), device="cpu", dtype=torch.float32)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.parallel.topology import Topology


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh. group is None where torch.distributed is not in use or the size is 1 without a group."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """The axes of a run (data, tensor, pipeline and context parallelism, the whole world) and this rank's device."""

    dp: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    world: Axis
    device: torch.device

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Mesh:
        """Return the mesh of one process, which needs no torch.distributed."""
        axes = {name: Axis(name) for name in ("dp", "tp", "pp", "cp", "world")}
        return cls(**axes, device=torch.device(device))

    @classmethod
    def create(cls, tp: int = 1, pp: int = 1, device: str | torch.device = "cpu") -> Mesh:
        """Build the groups of every axis; every rank must call it, with torch.distributed initialised.

        tp, pp: sizes of the tensor and pipeline axes; the data axis takes the remaining factor.
        Raises LaunchError where the world is not a multiple of tp * pp.
        """
        topology = Topology.from_world(dist.get_world_size(), tp=tp, pp=pp)
        rank = dist.get_rank()
        return cls(
            dp=_axis("dp", topology.groups("data"), rank),
            tp=_axis("tp", topology.groups("model"), rank),
            pp=_axis("pp", topology.groups("pipe"), rank),
            cp=Axis("cp"),
            world=Axis("world", topology.world_size, rank, dist.group.WORLD),
            device=torch.device(device),
        )

    def describe(self) -> str:
        """Return this rank's coordinates for messages, such as `rank 3 pp0 dp1 tp1`."""
        return f"rank {self.world.rank} pp{self.pp.rank} dp{self.dp.rank} tp{self.tp.rank}"


def _axis(name: str, groups: list[list[int]], rank: int) -> Axis:
    """Return the axis whose groups are `groups`; creates one process group for each, on every rank alike."""
    mine: Axis | None = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = Axis(name, len(ranks), ranks.index(rank), group)
    assert mine is not None, f"rank {rank} is in no group of {name}"
    return mine
