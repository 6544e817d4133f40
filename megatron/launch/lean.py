"""Keeps torch's compiler out of a run that does not compile, without changing what happens when one does.

Importing torch._dynamo costs 0.7 s, and torch.optim imports it at the first optimizer and the first step, only to
exempt its own functions from compilation. Here the exemptions are made once torch._dynamo is really loaded. What
DeepSpeed imports it for, `megatron.engine.deferred` puts off.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

# The attribute under which torch._compile._disable_dynamo keeps a function that is exempt from compilation.
_CACHE = "__dynamo_disable"


def defer_compiler() -> None:
    """Make the exemptions of torch.optim wait until they are needed."""
    for exempt in vars(torch.optim.Optimizer).values():
        original = getattr(exempt, "__wrapped__", None)
        if original is not None and getattr(exempt, "__module__", "") == "torch.optim.optimizer":
            setattr(original, _CACHE, _exempt_when_loaded(original))
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "step" in vars(kind):
            _defer_step(kind)


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
