"""Keeps torch's compiler out of a run that does not compile: what DeepSpeed compiles is compiled when it is called.

DeepSpeed decorates three functions of Muon with torch.compile, which imports torch._dynamo in 0.7 s. They are imported
here, before anything of DeepSpeed's that needs them, under a torch.compile that waits for the first call.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_COMPILED_BY_DEEPSPEED = ("deepspeed.runtime.zero.muon.original_muon",)


def defer_compilation() -> None:
    """Import DeepSpeed's modules that compile, so that they do not yet; once the compiler is there, do nothing."""
    if "torch._dynamo" in sys.modules:
        return
    with _compiling_at_first_call():
        for name in _COMPILED_BY_DEEPSPEED:
            importlib.import_module(name)


@contextmanager
def _compiling_at_first_call() -> Iterator[None]:
    """Within the block, `@torch.compile` compiles a function when it is first called."""
    real = torch.compile
    torch.compile = at_first_call(real)
    try:
        yield
    finally:
        torch.compile = real


def at_first_call(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator like `compile_now`, whose result calls that when it is first called itself."""

    def decorate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(decorate, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    return decorate
