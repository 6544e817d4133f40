"""An operation's eager formula under torch.compile: its element-wise passes in one, C++ on a CPU, Triton on a GPU.

It is tried only where it is asked for, or was measured to be the fastest on a GPU, since `torch._dynamo` alone takes
0.7 s to import and each operation seconds to compile. On a CPU it needs a C++ compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from megatron.ops.choice import Candidate, Function, Situation

COMPILE = "compile"

_numbers = itertools.count()


@dataclass(frozen=True)
class Compiled(Candidate):
    """place: of the eager function."""

    def load(self) -> Function:
        """Return the function, which is compiled when it is first called, for each kind of inputs."""
        compiled: Function = torch.compile(own_copy(super().load()))
        return compiled

    def obstacle(self, situation: Situation) -> str:
        """Return why nothing can be compiled here, or ""."""
        if situation.device.type == "cpu":
            return compiler_obstacle()
        if situation.device.type != "cuda":
            return f"needs a CPU or a CUDA device, and this is {situation.device.type}"
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def own_copy(function: Function) -> Function:
    """Return the function with code of its own, by which torch.compile remembers the shapes that it met.

    Those of a probe must not make it compile a run's function for any shape.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def compiler_obstacle() -> str:
    """Return what torch.compile says where it finds no C++ compiler, or ""."""
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:  # whatever torch says of a machine that it cannot compile on
        return f"needs a C++ compiler such as g++ ({' '.join(f'{type(error).__name__}: {error}'.split())})"
    return ""


def mend_cpp_reductions() -> None:
    """Let torch.compile write a bf16 sum over rows to two results, which on a CPU is a C++ error (torch 2.13).

    Biases that are added to the same values have the same gradient: those of both branches of a parallel block. Its
    code generator declares the rounded sum once for each result, in one scope; here each declaration has its own.
    """
    kernel: Any = importlib.import_module("torch._inductor.codegen.cpp").CppVecKernel
    if getattr(kernel, _MENDED, False):
        return
    store = kernel.store_reduction

    def in_a_scope(self: Any, *arguments: Any) -> None:
        self.reduction_suffix.writeline("{")
        store(self, *arguments)
        self.reduction_suffix.writeline("}")

    kernel.store_reduction = in_a_scope
    setattr(kernel, _MENDED, True)


_MENDED = "has_scopes"
