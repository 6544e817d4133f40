"""From layer plans to modules with canonical names and initial weights, for a whole model or a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from megatron.model.init import initialize
from megatron.model.plan import LayerPlan
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import full_shape, get_spec

Names = Mapping[str, str]
"""Name of a parameter within its layer's module -> its canonical name in the whole model."""


def build_modules(
    root: nn.Module,
    plans: Sequence[LayerPlan],
    device: str | torch.device,
    dtype: torch.dtype,
    names: Sequence[Names] | None = None,
) -> list[nn.Module]:
    """Return the module of each plan, registered under `root`; plans that share get the same module.

    names: the canonical names of each plan's parameters, where they do not follow from `plans` alone: a part of a model
        may hold a parameter that is named after a layer of another part. Weights are not meaningful yet.
    """
    modules: list[nn.Module] = []
    shared: dict[str, nn.Module] = {}
    for index, plan in enumerate(plans):
        module = shared.get(plan.share or "")
        if module is None:
            with torch.device(device), _default_dtype(dtype):
                module = plan.build()
            if names is not None:
                _register_elsewhere(root, plan.name, module, names[index])
            if names is None or not names[index] or f"{plan.name}." in _prefixes(names[index]):
                _register(root, plan.name, module)
            if plan.share:
                shared[plan.share] = module
        modules.append(module)
    return modules


@torch.no_grad()
def fill(root: nn.Module, seed: int | None, tensor_axis: Axis) -> None:
    """Give every parameter its initial weights, which follow from the seed and its canonical name.

    seed: None sets all weights to zero, for a checkpoint to fill: memory that nobody wrote may hold NaN, which equals
        nothing, not even itself.
    """
    if seed is not None:
        initialize(root, "", seed, tensor_axis)
        return
    for parameter in root.parameters():
        parameter.zero_()


def full_shapes(root: nn.Module, tensor_size: int) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every parameter below `root`, by name; tensor_size: ranks that share each of them."""
    parameters = root.named_parameters()
    return {name: full_shape(parameter.shape, get_spec(parameter), tensor_size) for name, parameter in parameters}


def _register_elsewhere(root: nn.Module, plan_name: str, module: nn.Module, names: Names) -> None:
    """Register the submodules whose parameters have their canonical name from another layer, under that name."""
    for local, canonical in names.items():
        if canonical == f"{plan_name}.{local}":
            continue
        owner, _, _ = local.rpartition(".")
        path, _, _ = canonical.rpartition(".")
        _register(root, path, module.get_submodule(owner))


def _prefixes(names: Names) -> set[str]:
    """Return the canonical prefix of each parameter's layer."""
    return {canonical.removesuffix(local) for local, canonical in names.items()}


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add `module` below `root` at a dotted name; what lies between are plain containers."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
