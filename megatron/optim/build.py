"""The YAML's optimizer block -> a torch optimizer, by one literal table.

`optimizer: {"type": "adam", "params": {"lr": 6.0e-4, "betas": [0.9, 0.95]}}`, in any case. Weight decay is the
key `weight_decay` of its own. Optimizers of DeepSpeed come from the engine, the one place that imports it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem
from megatron.optim.base import State, StatefulOptimizer
from megatron.optim.groups import parameter_groups
from megatron.optim.lion import Lion
from megatron.optim.madgrad_wd import MadgradWD
from megatron.optim.schedules import peak_learning_rate
from megatron.optim.sm3 import SM3

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """build: from parameter groups (with weight_decay in each) and the block's params.
    parameters: the names that `optimizer.params` may hold.
    elementwise: it can run on any flat slice of the parameters, as ZeRO needs.
    weight_decay: it honours the key `weight_decay`.
    """

    build: Callable[..., Optimizer]
    parameters: frozenset[str]
    elementwise: bool = True
    weight_decay: bool = True


def _names(*names: str) -> frozenset[str]:
    return frozenset(("lr", *names))


def _adamw(groups: Groups, **params: Any) -> Optimizer:
    """torch's fused AdamW: decay is decoupled, as in NeoX's FusedAdam; it needs no compiler."""
    return AdamW(groups, fused=True, **params)


def _sm3(groups: Groups, **params: Any) -> Optimizer:
    parameters = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    return SM3(parameters, **params)


def _apex_adam(groups: Groups, **params: Any) -> Optimizer:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            Problem(
                what='optimizer.type = "apex_adam"',
                why=f"apex cannot be imported: {error}.",
                fix='Use "adam", which is torch\'s fused AdamW, or install requirements/requirements-apex.txt.',
            )
        ) from error
    optimizer: Optimizer = FusedAdam(groups, adam_w_mode=True, **params)
    return optimizer


KINDS: dict[str, OptimizerKind] = {
    "adam": OptimizerKind(_adamw, _names("betas", "eps")),
    "adamw": OptimizerKind(_adamw, _names("betas", "eps")),
    "cpu_torch_adam": OptimizerKind(_adamw, _names("betas", "eps")),
    "apex_adam": OptimizerKind(_apex_adam, _names("betas", "eps")),
    "sgd": OptimizerKind(SGD, _names("momentum", "nesterov")),
    "lion": OptimizerKind(Lion, _names("betas")),
    "madgrad_wd": OptimizerKind(MadgradWD, _names("momentum", "eps")),
    "sm3": OptimizerKind(_sm3, _names("momentum", "beta", "eps"), elementwise=False, weight_decay=False),
}

_REFUSED = dict.fromkeys(
    ("onebitadam", "onebitlamb", "zerooneadam"),
    "its compressed communication has a warm-up and an error state outside the optimizer, which neither the "
    "checkpoints nor the exact gradient sums of this library can hold.",
)


def optimizer_kind(config: Config, extra: Mapping[str, OptimizerKind] | None = None) -> OptimizerKind:
    """Return the table's row for the YAML's `optimizer.type`; `extra` adds the engine's own rows.

    Raises ConfigError for a type that is unknown or refused, a parameter it does not take, or a weight decay
    that it would not apply.
    """
    kinds = {**KINDS, **(extra or {})}
    block = config.optimizer.optimizer
    name = str(block.get("type", "adam")).lower()
    if name in _REFUSED:
        raise ConfigError(Problem(f'optimizer.type = "{name}"', _REFUSED[name], 'Use "adam".'))
    if name not in kinds:
        nearest = difflib.get_close_matches(name, kinds, n=1)
        fix = f'Did you mean "{nearest[0]}"? ' if nearest else ""
        raise ConfigError(
            Problem(f'optimizer.type = "{name}"', "there is no such optimizer.", f"{fix}Choose from {sorted(kinds)}.")
        )
    problems = [_unknown_parameter(name, key, kinds[name]) for key in _unknown(block, kinds[name])]
    if config.optimizer.weight_decay and not kinds[name].weight_decay:
        problems.append(
            Problem(
                f"weight_decay = {config.optimizer.weight_decay}",
                f'optimizer "{name}" has no weight decay.',
                'Set "weight_decay": 0.',
            )
        )
    if problems:
        raise ConfigError(*problems)
    return kinds[name]


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
    if type(optimizer).__name__ in ("DeepSpeedCPUAdam", "FusedAdam"):
        return {"step": 0, **moments}
    raise NotImplementedError(f"the initial state of {type(optimizer).__name__} is not known")


def _unknown(block: dict[str, Any], kind: OptimizerKind) -> list[str]:
    return [key for key in block.get("params", {}) if key not in kind.parameters]


def _unknown_parameter(name: str, key: str, kind: OptimizerKind) -> Problem:
    if key == "weight_decay":
        fix = 'Write "weight_decay" as a key of its own, outside the optimizer block.'
    else:
        fix = f"Remove it; {name} takes {sorted(kind.parameters)}."
    return Problem(f"optimizer.params.{key}", f'optimizer "{name}" does not take it here.', fix)
