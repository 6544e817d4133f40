"""Keys that another key makes idle: nothing that a person sets may be without effect unseen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.config import keys
from megatron.config.draft import Draft, either
from megatron.config.engine import is_local
from megatron.config.float8 import layers_without_float8
from megatron.config.values import choices

_TOKENIZERS = choices(keys.fields()["tokenizer_type"][1].annotation)
_EFFECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    # key that is set: (the key that it depends on, the values under which it has an effect)
    "rotary_pct": ("pos_emb", ("rotary",)),
    "rotary_emb_base": ("pos_emb", ("rotary",)),
    "rpe_num_buckets": ("pos_emb", ("rpe",)),
    "rpe_max_distance": ("pos_emb", ("rpe",)),
    "opt_pos_emb_offset": ("pos_emb", ("learned",)),
    "mup_rp_embedding_mult": ("pos_emb", ("learned", "sinusoidal")),
    "rms_norm_epsilon": ("norm", ("rmsnorm",)),
    "scalenorm_epsilon": ("norm", ("scalenorm",)),
    "layernorm_epsilon": ("norm", ("layernorm", "non_parametric_layernorm")),
    "wsd_decay_fraction": ("lr_decay_style", ("wsd",)),
    "wsd_decay_shape": ("lr_decay_style", ("wsd",)),
    "weighted_sampler_alpha": ("weight_by_num_documents", (True,)),
    "gradient_predivide_factor": ("prescale_gradients", (True,)),
    "checkpoint_num_layers": ("checkpoint_activations", (True,)),
    "checkpoint_operations": ("checkpoint_activations", (True,)),
    "checkpoint_first_layers": ("checkpoint_activations", (True,)),
    "vocab_file": ("tokenizer_type", tuple(kind for kind in _TOKENIZERS if kind != "CharLevelTokenizer")),
    "scaled_upper_triang_masked_softmax_fusion": ("attention_backend", ("dense",)),
    "scaled_masked_softmax_fusion": ("attention_backend", ("dense",)),
    "fp8_fusion": ("precision", ("fp8",)),
    "allow_chopped": ("pack_impl", ("pack_until_overflow", "unpacked")),
}
_DEEPSPEEDS = ("wall_clock_breakdown", "dump_state")
_MANY_THREADS = 64


_NEEDS_PROCESSES = {
    # key that is set: the size that must be 2 or more for it to have an effect
    "context_parallel_method": "context_parallel_size",
    "sequence_parallel": "model_parallel_size",
    "fp32_allreduce": "model_parallel_size",
    "pipe_partition_method": "pipe_parallel_size",
}


_SAVES = ("checkpoint_interval_minutes", "async_save", "s3_path", "s3_chunk_size")  # keys of how it is saved


def without_effect(draft: Draft) -> Iterator[str]:
    """Yield a sentence for each key that is set away from its default, and that another key makes idle."""
    for key, (condition, values) in _EFFECT.items():
        if _is_set(draft, key) and draft.values[condition] not in values:
            yield _sentence(draft, key, either([f"{condition}: {_text(value)}" for value in values]))
    for key, size in _NEEDS_PROCESSES.items():
        if _is_set(draft, key) and draft.values[size] < 2:
            yield _sentence(draft, key, f"{size}: 2 or more")
    if is_local(draft.values):
        yield from (_sentence(draft, key, "engine: deepspeed") for key in _DEEPSPEEDS if _is_set(draft, key))
    if not draft.values["save"]:
        yield from (_sentence(draft, key, "save") for key in _SAVES if _is_set(draft, key))
    elif _is_set(draft, "s3_chunk_size") and not (draft.values["s3_path"] or "://" in draft.values["save"]):
        yield _sentence(draft, "s3_chunk_size", "s3_path")
    yield from _beyond_the_end(draft)
    yield from _too_many_threads(draft)
    yield from layers_without_float8(draft)


def _beyond_the_end(draft: Draft) -> Iterator[str]:
    last, steps = draft.values["train_iters"], draft.values["extra_save_iters"] or []
    beyond = [str(step) for step in steps if last is not None and step > last]
    if beyond:
        listed = ", ".join(beyond[:4]) + (f" and {len(beyond) - 4} more" if len(beyond) > 4 else "")
        yield f"{_place(draft, 'extra_save_iters')}extra_save_iters: {listed} is beyond the end, train_iters = {last}."


def _too_many_threads(draft: Draft) -> Iterator[str]:
    threads = draft.values["num_workers"]
    if threads > _MANY_THREADS:
        why = "is more threads for each rank than read ahead faster; 2 to 8 are enough."
        yield f"{_place(draft, 'num_workers')}num_workers = {threads} {why}"


def _place(draft: Draft, key: str) -> str:
    return f"{draft.where(key)}: " if draft.where(key) else ""


def _is_set(draft: Draft, key: str) -> bool:
    return draft.given(key) and draft.values[key] != keys.default(key)


def _sentence(draft: Draft, key: str, needed: str) -> str:
    return f"{_place(draft, key)}{key} has no effect without {needed}."


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
