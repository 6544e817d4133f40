"""AdamW in one pass over memory, and the sum of squares that clipping needs: adamw.cpp says how."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.ops import adamw
from megatron.ops.cpu.library import DTYPES, is_plain, kernel

_MOMENTS = (torch.float32, torch.bfloat16)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """`megatron.ops.adamw.sum_of_squares`, whatever the number of threads."""
    if not _are_plain(tensors):
        return adamw.sum_of_squares(tensors)
    result = torch.empty((), dtype=torch.float64)
    table = _table(_sizes(tensors), _addresses(tensors), [DTYPES[tensor.dtype] for tensor in tensors])
    kernel("deepy_sum_of_squares", "pip")(table, len(tensors), result.data_ptr())
    return result


def adamw_update_(
    gradients: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    coefficient: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = 0,
    first: int = 0,
) -> None:
    """`megatron.ops.adamw.adamw_update_`; gradients stay."""
    lists = gradients, masters, averages, squares, weights
    if not (_can_update(*lists) and _are_scalars(coefficient, step, *([rate] if isinstance(rate, Tensor) else []))):
        numbers: tuple[Any, ...] = rate, beta1, beta2, eps, weight_decay, seed, first
        adamw.adamw_update_(*lists, coefficient, step, *numbers)
        return
    gradients = [gradient.contiguous() for gradient in gradients]
    table = _table(
        _sizes(masters), _addresses(gradients), [DTYPES[gradient.dtype] for gradient in gradients],
        *(_addresses(tensors) for tensors in (masters, averages, squares)), _addresses(weights) or [0] * len(masters),
    )  # fmt: skip
    rates, rate = (rate.data_ptr(), 0.0) if isinstance(rate, Tensor) else (None, rate)
    kernel("deepy_adamw", "piiipppdddddii")(
        table, len(masters), DTYPES[averages[0].dtype], DTYPES[weights[0].dtype] if weights else 0,
        coefficient.data_ptr(), step.data_ptr(), rates, rate, beta1, beta2, eps, weight_decay, seed, first,
    )  # fmt: skip


def _can_update(
    gradients: list[Tensor], masters: list[Tensor], averages: list[Tensor], squares: list[Tensor], weights: list[Tensor]
) -> bool:
    """Return whether the kernel takes these: all in the CPU's memory, of one dtype each, and in order."""
    moments = {tensor.dtype for tensor in (*averages, *squares)}
    return (
        is_plain(*gradients)
        and _are_plain([*masters, *averages, *squares, *weights])
        and all(master.dtype == torch.float32 for master in masters)
        and len(moments) == 1
        and moments.issubset(_MOMENTS)
        and len({weight.dtype for weight in weights}) <= 1
    )


def _are_scalars(*tensors: Tensor) -> bool:
    return is_plain(*tensors) and all(tensor.dtype == torch.float32 and tensor.numel() == 1 for tensor in tensors)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return is_plain(*tensors) and all(tensor.is_contiguous() for tensor in tensors)


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.numel() for tensor in tensors]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _table(*rows: list[int]) -> ctypes.Array[ctypes.c_int64]:
    numbers = [number for row in rows for number in row]
    return (ctypes.c_int64 * len(numbers))(*numbers)
