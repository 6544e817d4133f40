"""The learning rate as a pure function of the number of updates done: no state, so nothing to save or resume.

With t updates done, H the horizon (`lr_decay_iters`, or `lr_decay_fraction` of the run, or the run),
W = warmup * H, D = H - W and u = min(t - W, D):

    t <= W       lr * max(1, t) / W
    constant     lr
    linear       lr * (D - u) / D
    cosine       min_lr + (lr - min_lr) / 2 * (1 + cos(pi * u / D))
    exponential  lr * exp(-0.693 * u / D)
    wsd          lr, then over the last `wsd_decay_fraction` of H a fall to min_lr

and never less than min_lr after the warm-up. These are GPT-NeoX's formulae (`learning_rates.py`), except
that NeoX does not clamp u: its cosine climbs back after H. `neox_compat: true` keeps that. WSD follows
Megatron-LM's optimizer_param_scheduler.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.config.schema.training import OptimizerConfig
from megatron.errors import ConfigError, Problem

_DECAYS: dict[str, Callable[[float, float, float, float], float]] = {
    # (u, D, lr, min_lr) -> learning rate, in the order of operations that gives NeoX's bits
    "constant": lambda u, d, lr, min_lr: lr,
    "linear": lambda u, d, lr, min_lr: lr * (d - u) / d,
    "cosine": lambda u, d, lr, min_lr: min_lr + (lr - min_lr) / 2.0 * (math.cos(math.pi * u / d) + 1),
    "exponential": lambda u, d, lr, min_lr: lr * math.exp(-0.693 * u / d),
}

_WSD_SHAPES: dict[str, Callable[[float], float]] = {
    # share of the decay done, 0 to 1 -> share of lr - min_lr that is left, 1 to 0
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}


def peak_learning_rate(optimizer: OptimizerConfig) -> float:
    """Return `optimizer.params.lr`, the rate at the end of the warm-up.

    Raises ConfigError where the YAML's optimizer block has none, or one that is not a number."""
    value = optimizer.optimizer.get("params", {}).get("lr")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ConfigError(
        Problem(
            what=f"optimizer.params.lr = {value!r}",
            why="the peak learning rate must be a number.",
            fix='Write it into the optimizer block: "optimizer": {"type": "adam", "params": {"lr": 6.0e-4}}.',
        )
    )


def decay_horizon(optimizer: OptimizerConfig, train_iters: int) -> int:
    """Return H, the number of updates after which the decay has ended (at least 1)."""
    if optimizer.lr_decay_iters is not None:
        return max(1, optimizer.lr_decay_iters)
    if optimizer.lr_decay_fraction is not None:
        return max(1, math.floor(train_iters * optimizer.lr_decay_fraction))
    return max(1, train_iters)


def learning_rate(optimizer: OptimizerConfig, train_iters: int, iteration: int) -> float:
    """Return the learning rate of the next update when `iteration` updates have been done.

    train_iters: length of the run in updates; the horizon where the config names no other.
    Raises ConfigError where the config has no peak learning rate.
    """
    lr, min_lr = peak_learning_rate(optimizer), optimizer.min_lr
    horizon = decay_horizon(optimizer, train_iters)
    warmup = optimizer.warmup * horizon
    if warmup > 0 and iteration <= warmup:
        return min(lr, lr * max(1, iteration) / warmup)  # a warm-up of less than one update must not overshoot
    if optimizer.lr_decay_style == "wsd":
        return _warmup_stable_decay(optimizer, lr, iteration, warmup, horizon)
    decay = horizon - warmup
    done = iteration - warmup
    if decay <= 0:  # all warm-up: what follows is the end of the decay
        done = decay = 1.0
    elif not optimizer.neox_compat:
        done = min(done, decay)
    return max(min_lr, _DECAYS[optimizer.lr_decay_style](done, decay, lr, min_lr))


def _warmup_stable_decay(optimizer: OptimizerConfig, lr: float, iteration: int, warmup: float, horizon: int) -> float:
    start = max(warmup, horizon * (1.0 - optimizer.wsd_decay_fraction))
    if iteration <= start:
        return lr
    if iteration >= horizon:
        return optimizer.min_lr
    left = _WSD_SHAPES[optimizer.wsd_decay_shape]((iteration - start) / (horizon - start))
    return optimizer.min_lr + left * (lr - optimizer.min_lr)
