"""The live engine compared with the config, and masters compared with weights: differences are fatal.

What DeepSpeed is told and what it does have differed before (clipping that was off, sums in bf16, random masters
under loaded weights), so what it does is read from the objects that do it, not from its config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.config.schema.config import Config
from megatron.engine.fragments import Fragment, Holdings
from megatron.errors import EngineError, Problem
from megatron.parallel.mesh import Mesh

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_GROUP_KEYS = ("lr", "weight_decay", "betas", "eps", "momentum", "beta", "nesterov")
_MOMENTS = ("exp_avg", "exp_avg_sq")

Facts = dict[str, Any]


def expected(config: Config, mesh: Mesh, stage: int, groups: Sequence[dict[str, Any]]) -> Facts:
    """Return what the config asks of the engine.

    stage: the ZeRO stage that serves the config's.
    groups: the parameter groups that `build_optimizer` made, taken before DeepSpeed flattened them.
    """
    precision = config.numerics.weight_precision
    types = config.deepspeed.data_types or {}
    return {
        "zero_optimization.stage": stage,
        "gradient_clipping": float(config.optimizer.gradient_clipping),
        "train_batch_size": config.batch.train_batch_size,
        "train_micro_batch_size_per_gpu": config.batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.batch.gradient_accumulation_steps,
        "replicas of the parameters": mesh.replicas.size,
        "precision of the parameters": precision,
        "precision of the masters": "fp32",
        "precision of accumulation": types.get("grad_accum_dtype", "fp32"),
        "precision of communication": config.deepspeed.communication_data_type or "fp32",
        "model_parallel_size": mesh.tp.size,
        "pipe_parallel_size": mesh.pp.size,
        "zero_optimization.offload_optimizer.device": _offload(config, "offload_optimizer"),
        "zero_optimization.offload_param.device": _offload(config, "offload_param"),
        "learning rate schedule of DeepSpeed's": None,
        "optimizer groups": list(groups),
        **({"precision of the moments": config.optimizer.moments_dtype} if _is_adam(config) else {}),
    }


def _is_adam(config: Config) -> bool:
    return "adam" in str(config.optimizer.optimizer.get("type", "adam")).lower()


def _offload(config: Config, entry: str) -> str:
    block: dict[str, Any] = config.parallel.zero_optimization.get(entry) or {}
    return str(block.get("device", "none"))


def group_facts(groups: Sequence[dict[str, Any]], num_parameters: Sequence[int]) -> list[Facts]:
    """Return the settings of each parameter group, and how many elements it trains."""
    return [
        {**{key: group[key] for key in _GROUP_KEYS if key in group}, "elements": count}
        for group, count in zip(groups, num_parameters, strict=True)
    ]


def common_facts(holdings: Holdings, module: nn.Module, mesh: Mesh) -> Facts:
    """Return what holds of any live engine, read from its tensors and its optimizer; every rank must call it."""
    groups = holdings.optimizer.param_groups
    return {
        "precision of the parameters": _dtypes(module.parameters()),
        "precision of the masters": _dtypes(buffer for buffer, _ in holdings.buffers),
        "precision of the moments": _dtypes(
            state[name] for state in holdings.optimizer.state.values() for name in _MOMENTS if name in state
        ),
        "optimizer groups": group_facts(groups, _elements(holdings, mesh)),
    }


def compare(wanted: Facts, found: Facts) -> None:
    """Raise EngineError naming both values of everything that differs."""
    problems = [
        Problem(
            what=f"{key} = {wanted[key]}",
            why=f"the live engine has {found[key]}.",
            fix="Remove keys from the DeepSpeed blocks and deepspeed_extra_args that set it otherwise.",
        )
        for key in wanted
        if wanted[key] != found[key]
    ]
    if problems:
        raise EngineError(*problems)


def check_masters(held: Sequence[Fragment], mesh: Mesh) -> None:
    """Raise EngineError on every rank unless all weights are their masters rounded; all ranks must call it."""
    wrong = [f.name for f in held if not torch.equal(f.master.to(f.weight.device, f.weight.dtype), f.weight)]
    report = torch.tensor(len(wrong), dtype=torch.int64, device=mesh.device)
    if mesh.world.group is not None:
        dist.all_reduce(report, group=mesh.world.group)
    if report.item():
        raise EngineError(
            Problem(
                what=f"{int(report)} fragments of weights differ from their fp32 masters",
                why=f"the first optimizer step would throw loaded weights away; on this rank: {wrong[:10]}.",
                fix="This is a defect of the engine: report it with the configuration.",
            )
        )


def _dtypes(tensors: Any) -> str:
    return " and ".join(sorted({DTYPES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors}))


def _elements(holdings: Holdings, mesh: Mesh) -> list[int]:
    """Return the elements that each parameter group trains, summed over the replicas."""
    groups = holdings.optimizer.param_groups
    group_of = {id(buffer): _index(groups, group) for buffer, group in holdings.buffers}
    counts = torch.zeros(len(groups), dtype=torch.int64, device=mesh.device)
    for fragment in holdings.owned:
        counts[group_of[id(fragment.buffer)]] += fragment.numel
    if mesh.replicas.group is not None:
        dist.all_reduce(counts, group=mesh.replicas.group)
    numbers: list[int] = counts.tolist()
    return numbers


def _index(groups: Sequence[dict[str, Any]], group: dict[str, Any]) -> int:
    return next(number for number, other in enumerate(groups) if other is group)
