"""Config, mesh, model and objective -> an Engine: our own or one of DeepSpeed's, as `config.engine` decides.

What the live engine does is read back and compared with the config before anything is trained.
"""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

from torch import nn

from megatron.config.engine import choose_engine
from megatron.config.schema.config import Config
from megatron.engine import verify
from megatron.engine.base import Engine
from megatron.engine.in_backward import InBackwardEngine
from megatron.engine.local import LocalEngine
from megatron.engine.recorded import RecordedEngine
from megatron.logs import get_logger
from megatron.malloc import keep_freed_memory
from megatron.model.compiled import compile_blocks
from megatron.objectives.build import Objective
from megatron.optim.build import build_optimizer
from megatron.parallel.mesh import Mesh

logger = get_logger(__name__)


def build_engine(config: Config, mesh: Mesh, model: nn.Module, objective: Objective) -> Engine:
    """Return the engine that trains `model` by `objective`, on every rank of the mesh.

    model: with parameters on the mesh's device, in fp32 or the run's precision; the engine casts and shards them.
    objective: (model, batch) -> (summed loss, trained tokens) of one micro-batch.
    Raises ConfigError for an optimizer or combination that cannot run, EngineError where the live engine
    differs from the config.
    """
    keep_freed_memory(mesh.device.type)
    choice = choose_engine(config)
    logger.info("engine: %s, as %s", "our own" if choice.is_local else "DeepSpeed's", choice.why)
    theirs = None if choice.is_local else _through_deepspeed()
    if config.kernels.compile is True:
        logger.info("compile: %d blocks, at their first call", compile_blocks(model))
    optimizer = build_optimizer(config, model.named_parameters(), theirs.OPTIMIZERS if theirs else None)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    wanted = verify.expected(config, mesh, choice.stage, verify.group_facts(optimizer.param_groups, sizes))
    engine: Engine = (theirs.build if theirs else _own(config))(config, mesh, model, optimizer, objective)
    found = engine.read_back()
    verify.compare(wanted, found)
    logger.info(
        "precision: parameters %s, masters %s, accumulation %s, communication %s",
        *(found[f"precision of {what}"] for what in ("the parameters", "the masters", "accumulation", "communication")),
    )
    engine.check_masters()
    return engine


def _own(config: Config) -> type[LocalEngine]:
    if config.kernels.cuda_graphs is True:
        return RecordedEngine
    return InBackwardEngine if config.optimizer.optimizer_in_backward else LocalEngine


def _through_deepspeed() -> ModuleType:
    """Import what needs DeepSpeed, without collecting garbage meanwhile: what an import makes stays."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module("megatron.engine.through_deepspeed")
    finally:
        if was_enabled:
            gc.enable()
