"""DeepSpeed's engines for a config: the single call of deepspeed.initialize.

What DeepSpeed is told is `config.deepspeed_json`, every key of it explicit. This module is imported for a run that
needs DeepSpeed, and for no other: its import takes longer than that of everything else but torch.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim import Optimizer

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.engine import without_deepspeed
from megatron.config.schema.config import Config
from megatron.engine.base import Engine
from megatron.engine.mpu import MeshUnit
from megatron.engine.partial import sum_partial_gradients
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.plain import DeepSpeedEngine
from megatron.engine.setup import prepare
from megatron.engine.stage import PipelineStage
from megatron.engine.whole_blocks import gather_whole
from megatron.errors import ConfigError, EngineError, Problem
from megatron.model.stage import StageModel
from megatron.objectives.build import Objective
from megatron.ops.lent_linear import lend
from megatron.optim.build import OptimizerKind
from megatron.optim.compact_adamw import CompactAdamW
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.mesh import Mesh


def build(config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective) -> Engine:
    """Return the engine of a model, or of its stage of a pipeline; arguments as in `engine.build.build_engine`."""
    prepare(mesh)
    _require_precision(config)
    if isinstance(optimizer, CompactAdamW):
        optimizer.seed += mesh.replicas.rank  # each has a share of the state, which the same bits would round alike
    make = _pipeline if mesh.pp.size > 1 else _plain
    return make(config, mesh, model, optimizer, objective)


def _plain(config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective) -> Engine:
    unit = MeshUnit(mesh) if mesh.tp.size > 1 else None
    live, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config), mpu=unit)
    sum_partial_gradients(live, TensorRegion(mesh.tp, config.parallel.sequence_parallel))
    if live.zero_optimization_stage() == 3:
        _let_weights_go(config, mesh, live)
    return DeepSpeedEngine(config, mesh, live, objective)


def _let_weights_go(config: Config, mesh: Mesh, live: Any) -> None:
    """Let nothing hold a gathered weight between a layer's forward pass and its backward pass.

    Blocks are gathered whole where they are compiled, and where one rank holds all: its gathered weights are views, and
    hooks on each part of a block take time for nothing."""
    for parameter in live.module.parameters():
        lend(parameter)
    if config.kernels.compile is True or mesh.replicas.size == 1:
        gather_whole(live)


def _pipeline(config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective) -> Engine:
    if not isinstance(model, StageModel):
        why = "a pipeline is built of stages, and this model is whole."
        raise EngineError(Problem(f"pipe_parallel_size = {mesh.pp.size}", why, "Build the model with build_model."))
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)  # over the group that is there
    stage = PipelineStage(model, mesh, objective)
    live, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=deepspeed_config(config))
    sum_partial_gradients(live, TensorRegion(mesh.tp, config.parallel.sequence_parallel))
    return PipelineEngine(config, mesh, live, stage, objective)


def _cpu_adam(groups: list[dict[str, Any]], **params: Any) -> Any:
    return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **params)


# DeepSpeed compiles it on first use; it updates masters that are offloaded to the CPU.
OPTIMIZERS = {"cpu_adam": OptimizerKind(_cpu_adam)}


def _require_precision(config: Config) -> None:
    """Raise ConfigError for fp16 on a device without it, as most CPUs are."""
    if config.numerics.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            Problem(
                what='precision = "fp16"',
                why=f"DeepSpeed does not run it on this machine's {get_accelerator().device_name()}.",
                fix=f"Set precision: bf16 or fp32 and remove an fp16 block, or {without_deepspeed(config)}.",
            )
        )
