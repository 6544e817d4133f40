"""A user's config -> a small one of the same kind, and the one process that it must agree with.

What decides whether a layout is right stays as it is: the sizes of tensor, pipeline and context parallelism, the ZeRO
block, accumulation, sequence parallelism, recomputation, precision, residual form, norms, positions, tying, gated MLPs,
attention patterns, and the ratios of grouped-query heads, rotated features and MLP width. What costs time does not:
layers, widths, sequence, vocabulary, batch. Dropout is off, since one process draws other masks.

    trial = shrink(config)          # trial.config on trial.world_size processes equals trial.reference on one
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron.config.float8 import MULTIPLE as FLOAT8_MULTIPLE
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.model.accounting import layer_types, mlp_shape, padded_vocab_size

STEPS = 3
VOCABULARY = 61
"""Token ids; prime, so that padding exists at every tensor parallel size."""

_MOST_ACCUMULATION = 4
_MOST_HEADS_PER_GROUP = 4
_LEAST_SEQUENCE = 16
# Keys that have nothing to do with a trial, by section; what is left out is at its default.
_LEFT_OUT = ("data", "tokenizer", "checkpoint", "monitor", "generation", "launcher")
_SILENT = {
    "wall_clock_breakdown": False, "dump_state": False, "flops_profiler": None, "comms_logger": None,
    "find_micro_batch_size": False,
}  # fmt: skip
# The rate is constant and large enough that three updates show in the loss.
_SCHEDULE = {
    "train_iters": STEPS, "train_epochs": None, "lr_decay_style": "constant", "lr_decay_iters": None,
    "lr_decay_fraction": None, "min_lr": 0.0, "warmup": 0.0, "eval_iters": 0, "exit_interval": None,
}  # fmt: skip
_RATE = 1e-3
# Small enough that the trial's few parameters fill several buckets, and are sharded under stage 3.
_BUCKETS = {
    "reduce_bucket_size": 5000, "allgather_bucket_size": 5000, "stage3_prefetch_bucket_size": 5000,
    "stage3_param_persistence_threshold": 50,
}  # fmt: skip
_ONE_PROCESS = {
    "model_parallel_size": 1, "pipe_parallel_size": 1, "context_parallel_size": 1, "sequence_parallel": False,
    "zero_optimization": {"stage": 0}, "engine": "auto", "compile": "auto", "checkpoint_activations": False,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """config: small, in the user's layout. reference: the same model and batches on one process at ZeRO stage 0.
    vocab_size: padded. changes: (key, the user's value, the trial's). notes: what else is not as the user's."""

    config: Config
    reference: Config
    vocab_size: int
    changes: tuple[tuple[str, Any, Any], ...]
    notes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Processes of the trial."""
        return self.config.parallel.world_size

    def in_precision(self, precision: str) -> Trial:
        """Return the same trial in another precision; both configs keep their layout."""
        configs = [
            resolve({**config.flat(), "precision": precision, "fp16": None, "bf16": None})
            for config in (self.config, self.reference)
        ]
        return replace(self, config=configs[0], reference=configs[1])


def shrink(config: Config, on_cpu: bool = True) -> Trial:
    """Return the trial of a config. on_cpu: it will run there, where fp16 is not computed and bf16 takes its place.

    Raises ConfigError where the small config breaks a rule, which would be a defect of this function."""
    sections = config.model_dump()
    flat = {key: value for name, keys in sections.items() if name not in _LEFT_OUT for key, value in keys.items()}
    small = {**_model(config), **_layout(config)}
    notes = []
    if config.numerics.precision == "fp16" and on_cpu:
        small |= {"precision": "bf16", "fp16": None}
        notes.append("precision fp16 is not computed on CPUs: the trial is in fp32 and bf16, without a loss scale.")
    if config.optimizer.optimizer["type"] == "cpu_adam":
        small["optimizer"] = {**config.optimizer.optimizer, "type": "adam"}
        notes.append("optimizer cpu_adam is replaced by adam, whose formula is the same and which needs no compiler.")
    if config.numerics.hidden_dropout or config.numerics.attention_dropout:
        notes.append("dropout is off, since one process draws other masks.")
    if flat.get("checkpoint_first_layers") is not None:
        small["checkpoint_first_layers"] = -(
            -flat["checkpoint_first_layers"] * small["num_layers"] // flat["num_layers"]
        )
    values = {**flat, **small, **_SCHEDULE, **_SILENT}
    values["optimizer"] = {**values["optimizer"], "params": {**values["optimizer"]["params"], "lr": _RATE}}
    dp = 2
    trial = resolve(values, world_size=dp * _per_model(config))
    vocab_size = padded_vocab_size(VOCABULARY, 8, config.parallel.model_parallel_size)
    return Trial(trial, _reference(trial), vocab_size, _changes(config, trial), tuple(notes))


def _per_model(config: Config) -> int:
    parallel = config.parallel
    return parallel.model_parallel_size * max(1, parallel.pipe_parallel_size) * parallel.context_parallel_size


def _reference(trial: Config) -> Config:
    """Return one process's config: micro-batches of the same size, all of them one after the other."""
    batch = trial.batch
    steps = batch.train_batch_size // batch.train_micro_batch_size_per_gpu
    values = {**trial.flat(), **_ONE_PROCESS, "gradient_accumulation_steps": steps}
    return resolve(values, world_size=1)


def _model(config: Config) -> dict[str, Any]:
    """Return the keys of the small model."""
    model, tp = config.model, config.parallel.model_parallel_size
    heads, kv_heads = _heads(config)
    part = FLOAT8_MULTIPLE if config.numerics.precision == "fp8" else 1
    hidden = heads * min(_head_dim(model.rotary_pct, part), model.hidden_size // model.num_attention_heads)
    _, width, _ = mlp_shape(model)
    branch = tp * part * max(1, round(width / model.hidden_size * hidden / tp / part))
    sequence = _sequence(config)
    types = _types(config)
    scale = sequence / model.seq_length
    window = model.sliding_window_width
    return {
        "num_layers": len(types),
        "attention_config": types if model.attention_config is not None else None,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": branch,  # both keys at the true width make a gated branch exactly that wide
        "mlp_multiple_of": branch,
        "expansion_factor": None,
        "seq_length": sequence,
        "max_position_embeddings": sequence * min(2, model.max_position_embeddings // model.seq_length),
        "sliding_window_width": None if window is None else max(1, math.ceil(window * scale)),
        "make_vocab_size_divisible_by": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _heads(config: Config) -> tuple[int, int | None]:
    """Return (query heads, key-value heads or None) that divide over the processes and keep the size of the groups."""
    model, parallel = config.model, config.parallel
    shared = parallel.context_parallel_size if parallel.context_parallel_method == "all_to_all" else 1
    split = parallel.model_parallel_size * shared
    groups = model.num_kv_heads or model.num_attention_heads
    size = min(model.num_attention_heads // groups, _MOST_HEADS_PER_GROUP)
    least = 2 if size > 1 else 4
    count = min(groups, split * -(-least // split))
    return count * size, None if model.num_kv_heads is None else count


def _head_dim(rotary_pct: float, part: int) -> int:
    """Return the least width of a head, from 8 and a multiple of `part`, of which rotary_pct is an even number of
    features."""
    least = max(8, part)
    fitting = (
        width for width in range(least, 1025, least) if int(width * rotary_pct) % 2 == 0 < int(width * rotary_pct)
    )
    return next(fitting, 1024)


def _sequence(config: Config) -> int:
    """Return the tokens of a sample: divisible by everything that cuts sequences."""
    parallel = config.parallel
    multiple = 2 * parallel.context_parallel_size * parallel.model_parallel_size
    return min(multiple * math.ceil(_LEAST_SEQUENCE / multiple), config.model.seq_length)


def _types(config: Config) -> list[str]:
    """Return the attention type of each layer: as many layers as stages, two at least, and each type of the model."""
    types = layer_types(config.model)
    least = max(2, config.parallel.pipe_parallel_size)
    count = next(n for n in range(1, len(types) + 1) if set(types[:n]) == set(types) and n >= min(least, len(types)))
    return types[:count] if count <= 8 else [*dict.fromkeys(types), *types][: max(least, len(set(types)))]


def _layout(config: Config) -> dict[str, Any]:
    batch, parallel, deepspeed = config.batch, config.parallel, config.deepspeed
    fp16 = deepspeed.fp16
    if config.numerics.precision == "fp16" and not (fp16 or {}).get("loss_scale"):
        fp16 = {**(fp16 or {}), "initial_scale_power": 8}  # so that the first steps do not overflow
    return {
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": min(2, batch.train_micro_batch_size_per_gpu),
        "gradient_accumulation_steps": min(_MOST_ACCUMULATION, batch.gradient_accumulation_steps),
        "world_size": None,
        "zero_optimization": {**parallel.zero_optimization, **_BUCKETS},
        "fp16": fp16,
    }


def _changes(config: Config, trial: Config) -> tuple[tuple[str, Any, Any], ...]:
    """Return the keys by which the trial is smaller than the user's config."""
    shown = (
        "num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "seq_length",
        "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    )  # fmt: skip
    theirs, ours = config.flat(), trial.flat()
    return tuple((key, theirs[key], ours[key]) for key in shown if theirs[key] != ours[key])
