"""The process mesh as a value: for each axis its size, this process's rank on it, and its process group.

Whoever needs a group is given the Mesh (or one Axis); no group is a global. `Mesh.single()` needs no
torch.distributed, so every module can be built in a REPL:

    model = SequentialModel(build_plans(config, 50304, Mesh.single()), device="cpu", dtype=torch.float32)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """The axes of a run, and this rank's device.

    dp: data, which samples a rank reads. cp: context, which part of their sequences it computes.
    replicas: the ranks that hold the same parameters (data and context together), over which losses, token counts and
        gradients are summed.
    tp: tensor, which share of each layer. pp: pipeline, which layers. ep: experts, neighbours among the replicas that
        share the experts of a layer.
    world: all ranks.
    """

    dp: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    replicas: Axis
    ep: Axis
    world: Axis
    device: torch.device

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Mesh:
        """Return the mesh of one process, which needs no torch.distributed."""
        axes = {name: Axis(name) for name in ("dp", "tp", "pp", "cp", "replicas", "ep", "world")}
        return cls(**axes, device=torch.device(device))

    @classmethod
    def create(cls, tp: int = 1, pp: int = 1, cp: int = 1, device: str | torch.device = "cpu", *, ep: int = 1) -> Mesh:
        """Build the groups of every axis; every rank must call it, with torch.distributed initialised.

        tp, pp, cp: sizes of the tensor, pipeline and context axes; the data axis takes the remaining factor.
        ep: size of the expert axis, which divides the replicas and takes no ranks of its own.
        Raises LaunchError where the world is not a multiple of tp * pp * cp, or the replicas of ep.
        """
        topology = Topology.from_world(dist.get_world_size(), tp=tp, pp=pp, cp=cp)
        rank = dist.get_rank()
        data = _axis("dp", topology.groups("data"), rank)
        return cls(
            dp=data,
            tp=_axis("tp", topology.groups("model"), rank),
            pp=_axis("pp", topology.groups("pipe"), rank),
            cp=Axis("cp") if cp == 1 else _axis("cp", topology.groups("context"), rank),
            replicas=replace(data, name="replicas") if cp == 1 else _axis("replicas", topology.replicas(), rank),
            ep=Axis("ep") if ep == 1 else _axis("ep", topology.expert_groups(ep), rank),
            world=Axis("world", topology.world_size, rank, dist.group.WORLD),
            device=torch.device(device),
        )

    def describe(self) -> str:
        """Return this rank's coordinates for messages, such as `rank 3 pp0 dp1 tp1`."""
        context = f" cp{self.cp.rank}" if self.cp.size > 1 else ""
        return f"rank {self.world.rank} pp{self.pp.rank} dp{self.dp.rank}{context} tp{self.tp.rank}"


def _axis(name: str, groups: list[list[int]], rank: int) -> Axis:
    """Return the axis whose groups are `groups`; creates one process group for each, on every rank alike."""
    mine: Axis | None = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = Axis(name, len(ranks), ranks.index(rank), group)
    assert mine is not None, f"rank {rank} is in no group of {name}"
    return mine
