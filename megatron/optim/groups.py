"""Which parameters decay: every tensor with two or more dims, and no others.

GPT-NeoX leaves out the parameters of norm modules and everything named `bias`; embeddings decay. In its
models those are the tensors with fewer than two dims, so the number of dims decides here and no name is read. Any
other tensor that must not decay carries `no_weight_decay = True`: norms over heads, whose gains have two dims.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to `parameter`."""
    return parameter.ndim >= 2 and not getattr(parameter, "no_weight_decay", False)


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return torch parameter groups, each with `params`, `weight_decay` and a `name`; frozen parameters are left out.

    Without weight decay there is one group, since fewer flat buffers are faster; empty groups are dropped.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if weight_decay == 0:
        return [{"params": trained, "weight_decay": 0.0, "name": "no_weight_decay"}]
    groups = [
        {"params": [p for p in trained if decays(p)], "weight_decay": weight_decay, "name": "weight_decay"},
        {"params": [p for p in trained if not decays(p)], "weight_decay": 0.0, "name": "no_weight_decay"},
    ]
    return [group for group in groups if group["params"]]
