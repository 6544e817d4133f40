"""What DeepSpeed asks about model parallelism, answered from a Mesh.

It is told of the tensor axis, over which it adds up the norm, and of the replicas, over which it shards and averages.
The context axis is among the replicas, and a pipeline tells DeepSpeed itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class MeshUnit:
    """DeepSpeed's "model parallel unit" of a mesh."""

    mesh: Mesh

    def get_model_parallel_rank(self) -> int:
        """Return this rank's place on the tensor axis."""
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Return the size of the tensor axis."""
        return self.mesh.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the group of the tensor axis."""
        return self.mesh.tp.group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place among the replicas of its parameters."""
        return self.mesh.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of replicas."""
        return self.mesh.replicas.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the group of the replicas."""
        return self.mesh.replicas.group
