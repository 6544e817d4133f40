"""The frozen configuration of a run: one section per subject, one flat key per field."""

from __future__ import annotations

from typing import Any

from megatron.config.schema.base import Section
from megatron.config.schema.data import DataConfig, TokenizerConfig
from megatron.config.schema.deepspeed import DeepspeedConfig
from megatron.config.schema.kernels import KernelsConfig
from megatron.config.schema.model import ModelConfig
from megatron.config.schema.numerics import NumericsConfig
from megatron.config.schema.parallel import BatchConfig, ParallelConfig
from megatron.config.schema.run import CheckpointConfig, GenerationConfig, LauncherConfig, MonitorConfig, StoppingConfig
from megatron.config.schema.training import OptimizerConfig, TrainingConfig


class Config(Section):
    """All that a run depends on, and nothing that depends on the run's rank or tokenizer."""

    model: ModelConfig
    numerics: NumericsConfig
    kernels: KernelsConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    stopping: StoppingConfig
    monitor: MonitorConfig
    generation: GenerationConfig
    launcher: LauncherConfig
    deepspeed: DeepspeedConfig

    def flat(self) -> dict[str, Any]:
        """Return all keys of all sections in one flat mapping, as a YAML file would hold them.

        A micro-batch that is still to be found is None there, and so is what follows from it."""
        values = {key: value for section in self.model_dump().values() for key, value in section.items()}
        if self.batch.find_micro_batch_size:
            values |= {"train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None}
        return values
