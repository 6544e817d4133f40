"""Config, mesh, model and objective -> an Engine: our own for ZeRO stage 0, DeepSpeed for stages 1 to 3 and pipelines.

Here is the single call of deepspeed.initialize.

What DeepSpeed is told is `config.deepspeed_json`, every key of it explicit; what it then does is read back and
compared before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim import Optimizer

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.schema.config import Config
from megatron.engine import verify
from megatron.engine.base import Engine
from megatron.engine.in_backward import InBackwardEngine
from megatron.engine.local import LocalEngine
from megatron.engine.mpu import MeshUnit
from megatron.engine.partial import sum_partial_gradients
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.plain import DeepSpeedEngine
from megatron.engine.setup import prepare
from megatron.engine.stage import PipelineStage
from megatron.errors import ConfigError, EngineError, Problem
from megatron.logs import get_logger
from megatron.model.stage import StageModel
from megatron.objectives.build import Objective
from megatron.optim.build import OptimizerKind, build_optimizer
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.mesh import Mesh

logger = get_logger(__name__)


def build_engine(config: Config, mesh: Mesh, model: nn.Module, objective: Objective) -> Engine:
    """Return the engine that trains `model` by `objective`, on every rank of the mesh.

    model: with parameters on the mesh's device, in fp32 or the run's precision; the engine casts and shards them.
    objective: (model, batch) -> (summed loss, trained tokens) of one micro-batch.
    Raises ConfigError for an optimizer or combination that cannot run, EngineError where the live engine
    differs from the config.
    """
    prepare(mesh)
    _require_precision(config, mesh)
    optimizer = build_optimizer(config, model.named_parameters(), _DEEPSPEED_OPTIMIZERS)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    stage = _stage(config, mesh)
    wanted = verify.expected(config, mesh, stage, verify.group_facts(optimizer.param_groups, sizes))
    engine = _kind(config, stage, mesh)(config, mesh, model, optimizer, objective)
    found = engine.read_back()
    verify.compare(wanted, found)
    logger.info(
        "precision: parameters %s, masters %s, accumulation %s, communication %s",
        *(found[f"precision of {what}"] for what in ("the parameters", "the masters", "accumulation", "communication")),
    )
    engine.check_masters()
    return engine


def _deepspeed(config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective) -> Engine:
    unit = MeshUnit(mesh) if mesh.tp.size > 1 else None
    live, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config), mpu=unit)
    sum_partial_gradients(live, TensorRegion(mesh.tp, config.parallel.sequence_parallel))
    return DeepSpeedEngine(config, mesh, live, objective)


def _pipeline(config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective) -> Engine:
    if not isinstance(model, StageModel):
        why = "a pipeline is built of stages, and this model is whole."
        raise EngineError(Problem(f"pipe_parallel_size = {mesh.pp.size}", why, "Build the model with build_model."))
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)  # over the group that is there
    stage = PipelineStage(model, mesh, objective)
    live, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=deepspeed_config(config))
    sum_partial_gradients(live, TensorRegion(mesh.tp, config.parallel.sequence_parallel))
    return PipelineEngine(config, mesh, live, stage, objective)


MakeEngine = Callable[[Config, Mesh, nn.Module, Optimizer, Objective], Engine]


def _kind(config: Config, stage: int, mesh: Mesh) -> MakeEngine:
    if mesh.pp.size > 1:
        return _pipeline
    if stage:
        return _deepspeed
    return InBackwardEngine if config.optimizer.optimizer_in_backward else LocalEngine


def _stage(config: Config, mesh: Mesh) -> int:
    """Return the ZeRO stage that serves the config's: the least that DeepSpeed's pipeline computes right is 1."""
    stage = int(config.parallel.zero_optimization.get("stage", 0))
    if stage == 0 and mesh.pp.size > 1:
        logger.info("zero_optimization.stage 0 is served by stage 1 in a pipeline; the arithmetic is the same")
        return 1
    return stage


def _cpu_adam(groups: list[dict[str, Any]], **params: Any) -> Any:
    return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **params)


# DeepSpeed compiles it on first use; it updates masters that are offloaded to the CPU.
_DEEPSPEED_OPTIMIZERS = {"cpu_adam": OptimizerKind(_cpu_adam)}


def _require_precision(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError for fp16 under DeepSpeed on a device without it, as most CPUs are."""
    if config.numerics.precision == "fp16" and _stage(config, mesh) and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            Problem(
                what='precision = "fp16"',
                why=f"DeepSpeed does not run it on this machine's {get_accelerator().device_name()}.",
                fix="Set precision: bf16 or fp32 and remove an fp16 block, or set zero_optimization.stage: 0.",
            )
        )
