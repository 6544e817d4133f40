"""DeepSpeed's ZeRO optimizers, stages 1 to 3 and BF16_Optimizer, read as Holdings.

The one place that knows the names of their inner buffers (DeepSpeed 0.19).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from megatron.engine import verify
from megatron.engine.fragments import Fragment, Holdings
from megatron.parallel.mesh import Mesh


def holdings(optimizer: Any, module: nn.Module) -> Holdings:
    """Return what this rank holds, which under ZeRO is what it owns."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    is_stage3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    fragments = list(_stage3(optimizer, names) if is_stage3 else _stage1_or_2(optimizer, names))
    scaler = getattr(optimizer, "loss_scaler", None)
    return Holdings(
        optimizer=optimizer.optimizer,
        buffers=_buffers(optimizer),
        held=fragments,
        owned=fragments,
        scaler=scaler if getattr(scaler, "dynamic", False) else None,
    )


def skip_by_norm(optimizer: Any) -> None:
    """Let ZeRO 2 tell a bf16 gradient that is not finite by its norm alone, as all other optimizers of DeepSpeed do.

    It would look through every gradient before, and wait for the device to say what it found."""
    if getattr(optimizer, "dtype", None) == torch.bfloat16 and isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer.check_grad_overflow = True  # without it the norm would not be looked at


@torch.no_grad()
def publish_masters(optimizer: Any) -> None:
    """Round the fp32 masters into the model's weights, on every rank; all ranks must call it."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # lets go of what is gathered, which would not be gathered again
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


def gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, gradient) of each parameter, reduced, between the last backward pass and the step.

    A gradient is gathered from all replicas, which must all read it."""
    for name, parameter in module.named_parameters():
        yield name, safe_get_full_grad(parameter)


def accumulation_dtype(optimizer: Any) -> torch.dtype:
    """Return what gradients are summed in over micro-batches."""
    is_bf16 = isinstance(optimizer, BF16_Optimizer)
    dtype: torch.dtype = optimizer.grad_acc_dtype if is_bf16 else optimizer.gradient_accumulation_dtype
    return dtype


def communication_dtype(live: Any) -> torch.dtype:
    """Return what gradients are summed in over ranks."""
    is_bf16 = isinstance(live.optimizer, BF16_Optimizer)  # the DeepSpeed engine reduces for it
    dtype: torch.dtype = (live if is_bf16 else live.optimizer).communication_data_type
    return dtype


def read_back(live: Any, found: Holdings, module: nn.Module, mesh: Mesh) -> verify.Facts:
    """Return what a live DeepSpeed engine does, under the names of the keys that asked for it; all ranks call it."""
    optimizer = live.optimizer
    grid = getattr(live, "grid", None)  # of a pipeline, whose mp_world_size counts stages as well
    offloads = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    return {
        "zero_optimization.stage": int(live.zero_optimization_stage()),
        "gradient_clipping": float(live.optimizer.clip_grad),
        "train_batch_size": live.train_batch_size() // mesh.cp.size,
        "train_micro_batch_size_per_gpu": live.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": live.gradient_accumulation_steps(),
        "replicas of the parameters": dist.get_world_size(live.seq_data_parallel_group),
        "precision of accumulation": verify.DTYPES[accumulation_dtype(live.optimizer)],
        "precision of communication": verify.DTYPES[communication_dtype(live)],
        "model_parallel_size": int(grid.get_slice_parallel_world_size() if grid else live.mp_world_size),
        "pipe_parallel_size": grid.get_pipe_parallel_world_size() if grid else 1,
        "zero_optimization.offload_optimizer.device": "cpu" if offloads else "none",
        "zero_optimization.offload_param.device": "cpu" if getattr(optimizer, "offload_param", False) else "none",
        "learning rate schedule of DeepSpeed's": live.lr_scheduler,
        **verify.common_facts(found, module, mesh),
    }


def _buffers(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    inner = optimizer.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return [
            (buffer, inner.param_groups[optimizer.sub_group_to_group_id[index]])
            for index, buffer in enumerate(optimizer.fp32_partitioned_groups_flat)
        ]
    return [(group["params"][0], group) for group in inner.param_groups]


def _stage1_or_2(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    groups = optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups
    for parameters, (buffer, _) in zip(groups, _buffers(optimizer), strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it belongs to other ranks
                continue
            where, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            yield Fragment(
                name=names[id(parameter)],
                parameter=parameter,
                shape=tuple(parameter.shape),
                start=where.start,
                numel=where.numel,
                weight=parameter.data.view(-1).narrow(0, where.start, where.numel),
                buffer=buffer,
                offset=place.start,
            )


def _stage3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for parameters, (buffer, _) in zip(optimizer.fp16_groups, _buffers(optimizer), strict=True):
        for parameter in parameters:
            _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * share
            numel = min(share, parameter.ds_numel - start)  # the last shares are padded
            if numel <= 0:
                continue
            yield Fragment(
                name=names[id(parameter)],
                parameter=parameter,
                shape=tuple(parameter.ds_shape),
                start=start,
                numel=numel,
                weight=parameter.ds_tensor.data.view(-1).narrow(0, 0, numel),
                buffer=buffer,
                offset=offset,
            )
