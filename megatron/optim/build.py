"""The YAML's optimizer block -> a torch optimizer, by one literal table.

`optimizer: {"type": "adam", "params": {"lr": 6.0e-4, "betas": [0.9, 0.95]}}`, in any case. Weight decay is the
key `weight_decay` of its own. Optimizers of DeepSpeed come from the engine, the one place that imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem
from megatron.optim.base import State, StatefulOptimizer
from megatron.optim.compact_adamw import CompactAdamW
from megatron.optim.groups import parameter_groups
from megatron.optim.lion import Lion
from megatron.optim.madgrad_wd import MadgradWD
from megatron.optim.schedules import peak_learning_rate
from megatron.optim.sm3 import SM3

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """build: from parameter groups (with weight_decay in each) and the block's params.
    elementwise: it can run on any flat slice of the parameters, as ZeRO needs.
    """

    build: Callable[..., Optimizer]
    elementwise: bool = True


def _adamw(groups: Groups, **params: Any) -> Optimizer:
    """torch's fused AdamW: decay is decoupled, as in NeoX's FusedAdam; it needs no compiler."""
    return AdamW(groups, fused=True, **params)


def _sm3(groups: Groups, **params: Any) -> Optimizer:
    parameters = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    return SM3(parameters, **params)


KINDS: dict[str, OptimizerKind] = {
    "adam": OptimizerKind(_adamw),
    "adamw": OptimizerKind(_adamw),
    "cpu_torch_adam": OptimizerKind(_adamw),
    "sgd": OptimizerKind(SGD),
    "lion": OptimizerKind(Lion),
    "madgrad_wd": OptimizerKind(MadgradWD),
    "sm3": OptimizerKind(_sm3, elementwise=False),
}


def optimizer_kind(config: Config, extra: Mapping[str, OptimizerKind] | None = None) -> OptimizerKind:
    """Return the table's row for the YAML's `optimizer.type`; `extra` adds the engine's own rows.

    Raises ConfigError for a type that has none."""
    kinds = {**KINDS, **(extra or {})}
    name = optimizer_name(config)
    if name not in kinds:
        raise ConfigError(
            Problem(f'optimizer.type = "{name}"', "there is no such optimizer.", f"Choose from {sorted(kinds)}.")
        )
    return kinds[name]


def optimizer_name(config: Config) -> str:
    """Return `optimizer.type` in lower case."""
    return str(config.optimizer.optimizer.get("type", "adam")).lower()


def build_optimizer(
    config: Config,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    extra: Mapping[str, OptimizerKind] | None = None,
) -> Optimizer:
    """Return the optimizer of the YAML over the trained parameters, decaying those that decay.

    Its learning rate is the peak; whoever steps it sets each group's `lr` first, from `schedules.learning_rate`.
    Raises ConfigError as `optimizer_kind` does.
    """
    kind = optimizer_kind(config, extra)
    groups = parameter_groups(named_parameters, config.optimizer.weight_decay)
    params = dict(config.optimizer.optimizer.get("params", {}))
    params["lr"] = peak_learning_rate(config.optimizer)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    if config.optimizer.moments_dtype == "bf16":  # the config's rules let Adam have it alone
        return CompactAdamW(groups, **params, seed=config.numerics.seed)
    return kind.build(groups, **params)


def initial_state(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> State:
    """Return the state that `optimizer` gives `parameter` before its first update.

    Raises NotImplementedError for an optimizer whose state this library does not know.
    """
    if isinstance(optimizer, StatefulOptimizer):
        return optimizer.initial_state(parameter, group)
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}
    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    if isinstance(optimizer, AdamW):
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return {"step": 0, **moments}
    raise NotImplementedError(f"the initial state of {type(optimizer).__name__} is not known")
