"""DeepSpeed, imported once and brought to reason: no shared-memory operation, quiet logs, a process group.

Every module of this package that needs DeepSpeed imports this one first.
"""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import deepspeed.runtime.bf16_optimizer
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from packaging.version import Version

from megatron.engine.deferred import defer_compilation
from megatron.errors import EngineError, Problem
from megatron.parallel.mesh import Mesh

_MINIMUM = Version("0.19.4")


def prepare(mesh: Mesh) -> None:
    """Make this process ready for deepspeed.initialize; doing it twice is harmless.

    A process without torch.distributed (Mesh.single(), a REPL) gets a group of its own, in memory.
    Raises EngineError where the installed DeepSpeed is too old to compute right gradients.
    """
    if Version(deepspeed.__version__) < _MINIMUM:
        raise EngineError(
            Problem(
                what=f"deepspeed {deepspeed.__version__}",
                why="releases before 0.19.3 scale gradients wrongly under accumulation.",
                fix="Run: pip install deepspeed==0.19.8",
            )
        )
    defer_compilation()
    # Training never uses this operation; its first use costs a minute of g++, and a build that is killed
    # leaves a lock on which every later run of the machine waits for ever.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
    deepspeed_logger.setLevel(logging.WARNING)
    # BF16_Optimizer prints its memory use eight times while it is built, collecting garbage each time (1.2 s).
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None
    # torch renamed the collectives that DeepSpeed calls; the advice is not for our users.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not dist.is_initialized():
        backend = "gloo" if mesh.device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    _require_device(mesh)


def _require_device(mesh: Mesh) -> None:
    """Raise EngineError where DeepSpeed would put the model on another kind of device than the mesh says."""
    chosen = torch.device(get_accelerator().current_device_name()).type
    if chosen != mesh.device.type:
        raise EngineError(
            Problem(
                what=f"device {mesh.device}",
                why=f'DeepSpeed has chosen "{chosen}".',
                fix=f"Set DS_ACCELERATOR={mesh.device.type} in the environment before Python starts.",
            )
        )
