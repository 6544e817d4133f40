"""From the config to what computes the operations of its model; `megatron.ops.choice` says how it is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem
from megatron.logs import get_logger
from megatron.model.attention_choice import choose_attention
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import UNMEASURED, Asked, Choices, Situation, choose
from megatron.ops.fp8 import obstacle
from megatron.ops.measured import fastest
from megatron.parallel.agreement import gathered
from megatron.parallel.mesh import Axis

logger = get_logger(__name__)

_MEASURE = (
    "auto knows nothing of %s and is mostly PyTorch's own. To let it choose the fastest here, run once, in some "
    "minutes, python benchmarks/kernels.py --write and python benchmarks/attention.py --write; they fill "
    "megatron/ops/measured.json, which all hosts must have alike"
)

_ACTIVATIONS = {"gelu": "bias_gelu", "swiglu": "bias_swiglu", "geglu": "bias_geglu"}
_NORMS = {"layernorm": "layer_norm", "non_parametric_layernorm": "layer_norm", "rmsnorm": "rms_norm"}


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> Choices:
    """Return what computes each operation of the model on the device, and say so where there was a choice."""
    if config.numerics.precision == "fp8":
        _tell_of_float8(device)
    asked = dict(_asked(config))
    choices = choose(asked, Situation(device, dtype, config.model.hidden_size), CATALOGUE, fastest)
    choices = Choices((*choices.choices, *choose_attention(config, device, dtype).choices))
    asked["attention"] = config.kernels.attention_backend
    if device.type == "cuda" or choices.refused() or any(wish not in ("auto", False) for wish in asked.values()):
        logger.info("kernels on %s:\n%s", device, choices.table())
    if any(choice.why == UNMEASURED for choice in choices.choices):
        logger.info(_MEASURE, torch.cuda.get_device_name(device))
    return choices


def _tell_of_float8(device: torch.device) -> None:
    """Say what precision: fp8 means on this device. Raises ConfigError where it cannot be computed."""
    reason = obstacle(device)
    if reason:
        raise ConfigError(Problem('precision = "fp8"', reason, "Set precision: bf16"))
    logger.info("precision fp8: the linear layers of the blocks multiply in float8, the rest is as in bf16")
    if device.type != "cuda":
        logger.info("fp8 on %s has the numbers of a GPU and not its speed: training is slower than in bf16", device)


def require_agreement(choices: Choices, world: Axis) -> None:
    """Raise ConfigError where ranks chose differently: what they hold alike would drift apart in its last digits."""
    mine = {choice.operation: (choice.candidate, choice.refused) for choice in choices.choices}
    first, *others = gathered(mine, world)
    problems = [
        _disagreement(operation, rank, first[operation], other[operation])
        for rank, other in enumerate(others, start=1)
        for operation in first
        if first[operation][0] != other[operation][0]
    ]
    if problems:
        raise ConfigError(*problems)


def _disagreement(operation: str, rank: int, first: Any, other: Any) -> Problem:
    """Return the problem of two ranks, of which each tells what it chose, and what it could not."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in (*first[1], *other[1]))
    return Problem(
        what=f"kernel of {operation}",
        why=f"rank 0 would use {first[0]} and rank {rank} {other[0]} ({reasons}).",
        fix="Mend what is in brackets, or set the key of this operation (docs/configuration.md, kernels) to false.",
    )


def activation_operation(config: Config) -> str | None:
    """Return the operation of the MLP's activation together with its bias; None where there is none."""
    if config.model.activation == "gelu" and config.numerics.bias_gelu_fusion:
        return "bias_gelu_tanh"
    return _ACTIVATIONS.get(config.model.activation)


def _asked(config: Config) -> Iterator[tuple[str, Asked]]:
    """Yield the operations of the model, each with what its key asks for."""
    model, kernels = config.model, config.kernels
    if model.norm in _NORMS:
        norm = _NORMS[model.norm]
        wish: Asked = kernels.rmsnorm_fusion if norm == "rms_norm" else kernels.layernorm_fusion
        yield norm, wish
        if not model.gpt_j_residual or config.parallel.model_parallel_size == 1:
            yield f"add_{norm}", wish
    if model.pos_emb == "rotary":
        yield "rotate_packed", kernels.rope_fusion
    activation = activation_operation(config)
    if activation is not None:
        yield activation, kernels.activation_fusion
    if config.numerics.hidden_dropout:
        yield "add_dropped", kernels.bias_dropout_fusion
    if config.numerics.precision == "fp8":
        yield "float8_linear", kernels.fp8_fusion
    yield "cross_entropy" if config.parallel.model_parallel_size == 1 else "share_losses", kernels.cross_entropy_fusion
