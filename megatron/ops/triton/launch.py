"""How a kernel becomes an operator of PyTorch, and how it is started.

    @operator()
    def rms_norm_forward(inputs: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        output, scale = torch.empty_like(inputs), inputs.new_empty(len(inputs), dtype=torch.float32)
        if runs(output):
            start(_forward, (len(inputs),), inputs, weight, output, scale, eps, COLUMNS=1024, num_warps=4)
        return output, scale

The one body serves four purposes. On CUDA tensors it starts the kernel; on CPU tensors it does so in Triton's
interpreter, where TRITON_INTERPRET=1 was set before triton was imported; on fake tensors (torch.compile, opcheck) and
meta tensors it only says shapes and dtypes; and on meta tensors inside of `recording` it tells what it would start,
for `compile.py`. Operators take no part in autograd: a `torch.autograd.Function` around a forward and a backward
operator costs 10 us a call, autograd registered with the operator 20 us (measured on a CPU core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors. Settled when triton is imported."""

_LIBRARY = torch.library.Library("deepy", "DEF")
_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
_H200_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is started with. constants: its constexprs, and num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[list[Launch]] = []
_recorded_for: list[int] = []


def operator(mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as torch.ops.deepy.<its name>, with the schema of its annotations; return the operator.

    mutates: arguments that are written to; outputs never share memory with arguments.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        for key in _KEYS:
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"deepy::{name}", function, lib=_LIBRARY)
        overload: Callable[..., Any] = getattr(torch.ops.deepy, name).default
        return overload

    return register


def runs(tensor: Tensor) -> bool:
    """Return whether kernels shall be started on this tensor, rather than shapes and dtypes told alone."""
    return not isinstance(tensor, FakeTensor) and (not tensor.is_meta or bool(_recorded))


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start kernel[grid](*arguments, **constants) on the device of its first tensor, or record it."""
    if _recorded:
        _recorded[-1].append(Launch(kernel, grid, arguments, constants))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


@contextmanager
def recording(arch: int = 90) -> Iterator[list[Launch]]:
    """Within the block, operators on meta tensors append what they would start on sm_<arch>, and start nothing."""
    _recorded.append([])
    _recorded_for.append(arch)
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()
        _recorded_for.pop()


def architecture(device: torch.device) -> int:
    """Return 90 for sm_90: that of the GPU, or the one that launches are recorded for."""
    if device.type == "cuda":
        return _capability(device)
    return _recorded_for[-1] if _recorded_for else 90


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs of a persistent kernel run side by side: those of the GPU, few in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _H200_MULTIPROCESSORS if device.type == "meta" else 3


def as_rows(tensor: Tensor) -> Tensor:
    """Return [..., h] as [rows, h] whose last dim is contiguous; copied only where strides leave no other way."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@dataclass(frozen=True)
class Sample:
    """An operation at a size that training meets, for what is compiled ahead of time.

    run(device): the operation, forward and backward, on uninitialised tensors of that device.
    least: the lowest architecture that has what the operation needs, as sm_<number>.
    """

    name: str
    run: Callable[[torch.device], None]
    least: int = 0
