"""The optimizer, its schedule, and the length of the run."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section


class OptimizerConfig(Section):
    optimizer: dict[str, Any] = {"type": "adam", "params": {"lr": 0.001}}
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "linear"
    lr_decay_iters: int | None = None
    lr_decay_fraction: float | None = None
    min_lr: float = 0.0
    warmup: float = 0.01
    wsd_decay_fraction: float = 0.1
    wsd_decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    neox_compat: bool = False


class TrainingConfig(Section):
    train_iters: int | None = None
    train_epochs: int | None = None
    eval_interval: int = 1000
    eval_iters: int = 100
    exit_interval: int | None = None
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = 1
    eod_mask_loss: bool = False
    char_level_ppl: bool = False
