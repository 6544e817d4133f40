"""How the model and the batch are spread over processes."""

from __future__ import annotations

from typing import Any

from megatron.config.schema.base import Section


class ParallelConfig(Section):
    pipe_parallel_size: int = 0
    model_parallel_size: int = 1
    sequence_parallel: bool = False
    world_size: int = 1
    zero_optimization: dict[str, Any] = {"stage": 0}
    distributed_backend: str | None = None


class BatchConfig(Section):
    """The batch triangle, whole after resolution:
    train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data parallel size."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
