"""Keeps torch's compiler out of a run that does not compile, without changing what happens when one does.

Importing torch._dynamo costs 0.7 s, and torch.optim imports it at the first optimizer and the first step, only to
exempt its own functions from compilation; DeepSpeed imports it for three functions of Muon. Here both wait: the
exemptions are made once torch._dynamo is really loaded, and Muon's functions are compiled when they are first called.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The attribute under which torch._compile._disable_dynamo keeps a function that is exempt from compilation.
_CACHE = "__dynamo_disable"
_COMPILED_BY_DEEPSPEED = ("deepspeed.runtime.zero.muon.original_muon",)


def defer_compiler() -> None:
    """Make the exemptions of torch.optim and the compilations of DeepSpeed wait until they are needed."""
    for exempt in vars(torch.optim.Optimizer).values():
        original = getattr(exempt, "__wrapped__", None)
        if original is not None and getattr(exempt, "__module__", "") == "torch.optim.optimizer":
            setattr(original, _CACHE, _exempt_when_loaded(original))
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "step" in vars(kind):
            _defer_step(kind)
    if "deepspeed" in sys.modules and "torch._dynamo" not in sys.modules:
        with _compiling_at_first_call():
            for name in _COMPILED_BY_DEEPSPEED:
                importlib.import_module(name)


def _exempt_when_loaded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, exempt from compilation from the moment that the compiler is loaded."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        exempt = torch._dynamo.disable(function, wrapping=False)
        setattr(function, _CACHE, exempt)
        return exempt(*args, **kwargs)

    return call


def _defer_step(kind: type[torch.optim.Optimizer]) -> None:
    """Let an optimizer's step set the gradient mode itself, unless the compiler is there to be told of it."""
    told: Any = vars(kind)["step"]
    original = getattr(told, "__wrapped__", None)
    if original is None or getattr(told, "hooked", False):
        return

    @functools.wraps(told)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return told(self, *args, **kwargs)
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable", False))):
            return original(self, *args, **kwargs)

    kind.step = step  # type: ignore[method-assign]


@contextmanager
def _compiling_at_first_call() -> Iterator[None]:
    """Within the block, `@torch.compile` compiles a function when it is first called."""
    real = torch.compile
    torch.compile = _deferred(real)
    try:
        yield
    finally:
        torch.compile = real


def _deferred(compile_now: Callable[..., Any]) -> Callable[..., Any]:
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
