"""Config, mesh, model and objective -> an Engine: our own for ZeRO stage 0, DeepSpeed for stages 1 to 3.

Here is the single call of deepspeed.initialize.

What DeepSpeed is told is `config.deepspeed_json`, every key of it explicit; what it then does is read back and
compared before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
from torch import nn
from torch.optim import Optimizer

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.schema.config import Config
from megatron.engine import verify
from megatron.engine.base import Engine
from megatron.engine.local import LocalEngine
from megatron.engine.plain import DeepSpeedEngine
from megatron.engine.setup import prepare
from megatron.errors import EngineError, Problem
from megatron.logs import get_logger
from megatron.objectives.build import Objective
from megatron.optim.build import OptimizerKind, build_optimizer
from megatron.parallel.mesh import Mesh

logger = get_logger(__name__)


def build_engine(config: Config, mesh: Mesh, model: nn.Module, objective: Objective) -> Engine:
    """Return the engine that trains `model` by `objective`, on every rank of the mesh.

    model: with parameters on the mesh's device, in fp32 or the run's precision; the engine casts and shards them.
    objective: (model, batch) -> (summed loss, trained tokens) of one micro-batch.
    Raises ConfigError for an optimizer or combination that cannot run, EngineError where the live engine
    differs from the config.
    """
    _require_layout(mesh)
    prepare(mesh)
    optimizer = build_optimizer(config, model.named_parameters(), _DEEPSPEED_OPTIMIZERS)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    wanted = verify.expected(config, mesh, _stage(config), verify.group_facts(optimizer.param_groups, sizes))
    engine = _ENGINES[_stage(config) > 0](config, mesh, model, optimizer, objective)
    found = engine.read_back()
    verify.compare(wanted, found)
    logger.info(
        "precision: parameters %s, masters %s, accumulation %s, communication %s",
        *(found[f"precision of {what}"] for what in ("the parameters", "the masters", "accumulation", "communication")),
    )
    engine.check_masters()
    return engine


def _deepspeed(config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective) -> Engine:
    live, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
    return DeepSpeedEngine(config, mesh, live, objective)


_ENGINES: dict[bool, Callable[[Config, Mesh, nn.Module, Optimizer, Objective], Engine]] = {
    False: LocalEngine,  # stage 0
    True: _deepspeed,
}


def _stage(config: Config) -> int:
    return int(config.parallel.zero_optimization.get("stage", 0))


def _cpu_adam(groups: list[dict[str, Any]], **params: Any) -> Any:
    return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **params)


# DeepSpeed compiles it on first use; it updates masters that are offloaded to the CPU.
_DEEPSPEED_OPTIMIZERS = {"cpu_adam": OptimizerKind(_cpu_adam)}


def _require_layout(mesh: Mesh) -> None:
    for axis, key in ((mesh.tp, "model_parallel_size"), (mesh.pp, "pipe_parallel_size")):
        if axis.size > 1:
            raise EngineError(
                Problem(f"{key} = {axis.size}", "this engine trains whole models only.", f"Set {key} to 1.")
            )
