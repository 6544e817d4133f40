"""What a config means, in words: the text that `--check` prints, and that stands at the start of a run.

    ./deepy.py train.py configs/125M.yml configs/local_setup.yml --check

Nothing here imports torch, so that the answer comes at once and on a login node.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config import keys, readiness, rules
from megatron.config.classify import Overrides
from megatron.config.corpus import Corpus, absent_files, read_corpus, train_fraction
from megatron.config.draft import show
from megatron.config.load import Settings, launcher_config, read
from megatron.config.places import located
from megatron.config.schema.config import Config
from megatron.config.tokenizer_file import count_tokens
from megatron.config.yaml_reader import Setting
from megatron.errors import ConfigError, LaunchError, Problem
from megatron.launch.command import find_layout
from megatron.model import accounting
from megatron.optim.schedules import decay_horizon, learning_rate

_KNOWN_VOCABULARIES = {"GPT2BPETokenizer": 50257, "HFGPT2Tokenizer": 50258, "CharLevelTokenizer": 512}
_USUAL_VOCABULARY = 50257


def run_check(paths: Sequence[str], config_dir: str | None = None, overrides: Overrides | None = None) -> int:
    """Print the report on some config files and return 0. Raises ConfigError with all problems."""
    settings = read(paths, config_dir, overrides)
    processes, wrong, unknown = _find_hosts(settings)
    try:
        resolution = settings.resolve(processes, planning=True)
    except ConfigError as error:
        raise ConfigError(*error.problems, *wrong, *unknown) from None
    if wrong:
        raise ConfigError(*wrong)
    text = report(resolution.config, resolution.notices, settings.values, unknown)
    print(" + ".join(str(file) for file in settings.files))
    print(text)
    return 0


def _find_hosts(settings: Settings) -> tuple[int, list[Problem], list[Problem]]:
    """Return (processes that a run would start from this machine, lines of the hostfile that are wrong, why hosts or
    devices cannot be known here); 1 process in both cases."""
    try:
        return find_layout(launcher_config(settings), os.environ).world_size, [], []
    except LaunchError as error:
        wrong = [problem for problem in error.problems if problem.where]
        return 1, wrong, located([problem for problem in error.problems if not problem.where], settings.values)
    except ConfigError:
        return 1, [], []  # which is said with the rest


def report(
    config: Config,
    notices: Iterable[str] = (),
    settings: Mapping[str, Setting] | None = None,
    hosts: Iterable[Problem] = (),
) -> str:
    """Return what a person should know before the run starts: notices, what differs from the defaults, what follows
    from it, and what is still missing.

    settings: the located values of the config, so that what is missing has its place. hosts: why it cannot be launched.
    Raises ConfigError for files that are here and broken."""
    places = settings or {}
    broken = readiness.broken(config)
    if broken:
        raise ConfigError(*located(broken, places))
    needs = [*readiness.runnable(config), *readiness.trainable(config), *readiness.absent(config)]
    missing = [*located(needs, places), *hosts]
    sections = [
        *(f"[note] {notice}" for notice in notices),
        "",
        "Differs from the defaults:",
        *_table(differences(config)),
        "",
        "Follows from it:",
        *_table(derived(config)),
    ]
    if missing:
        sections += ["", "Before it can train:", *(f"  {problem}" for problem in missing)]
    return "\n".join(sections).strip("\n")


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in listed]


def differences(config: Config) -> list[tuple[str, str]]:
    """Return (key, value) of every key that is not at its default, in the order of the sections."""
    derived_keys = {*rules.TRIANGLE, "world_size"}
    flat = config.flat()
    return [
        (key, show(_plain(flat[key])))
        for key in keys.fields()
        if key not in derived_keys and flat[key] != keys.default(key)
    ]


def _plain(value: Any) -> Any:
    """Return a whole float as the integer that a person would write."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def derived(config: Config) -> list[tuple[str, str]]:
    """Return (name, sentence) of everything that follows from the keys."""
    return [*_layout(config), *_batch(config), *_length(config), *_data(config), *_model(config), *_rates(config)]


def _layout(config: Config) -> list[tuple[str, str]]:
    parallel = config.parallel
    tp, pp = parallel.model_parallel_size, max(1, parallel.pipe_parallel_size)
    stage = parallel.zero_optimization["stage"]
    cp = f" x context {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
    return [
        ("processes", f"{parallel.world_size} = data {parallel.data_parallel_size} x tensor {tp} x pipeline {pp}{cp}"),
        ("ZeRO", f"stage {stage}"),
        (
            "precision",
            f"{config.numerics.precision} ({_weights(config)}fp32 masters, gradients accumulated and reduced in "
            f"{_sums(config)})",
        ),
    ]


def _weights(config: Config) -> str:
    return "bf16 weights, " if config.numerics.precision == "fp8" else ""


def _sums(config: Config) -> str:
    types = config.deepspeed.data_types or {}
    kinds = {types.get("grad_accum_dtype", "fp32"), config.deepspeed.communication_data_type or "fp32"}
    return " and ".join(sorted(kinds))


def _batch(config: Config) -> list[tuple[str, str]]:
    batch, dp = config.batch, config.parallel.data_parallel_size
    product = f"{batch.train_micro_batch_size_per_gpu} x {batch.gradient_accumulation_steps} x {dp}"
    if batch.find_micro_batch_size:
        product = f"the largest that fits x what it takes x {dp}"
    return [
        (
            "global batch",
            f"{batch.train_batch_size:,} sequences = {product} (micro-batch x accumulation x data parallel)",
        ),
        ("tokens per step", f"{tokens_per_step(config):,}"),
    ]


def tokens_per_step(config: Config) -> int:
    """Return the tokens of one optimizer step over all processes."""
    return config.batch.train_batch_size * config.model.seq_length


def _length(config: Config) -> list[tuple[str, str]]:
    iterations = config.training.train_iters
    if iterations is None:
        epochs = config.training.train_epochs
        return [("length", f"{epochs} epochs")] if epochs else []
    return [("length", f"{iterations:,} steps = {_count(iterations * tokens_per_step(config))} tokens")]


def _data(config: Config) -> list[tuple[str, str]]:
    """Return one line for each training data set that is here: its size, and how often the run reads it."""
    data, rows = config.data, []
    prefixes = [data.data_path] if data.data_path else data.train_data_paths or []
    weights = data.train_data_weights if not data.data_path and data.train_data_weights else [1.0] * len(prefixes)
    iterations = config.training.train_iters
    for prefix, weight in zip(prefixes, weights, strict=False):
        corpus = None if absent_files(prefix) else read_corpus(prefix)
        if not isinstance(corpus, Corpus):
            continue
        text = f"{prefix}: {_count(corpus.tokens)} tokens in {corpus.documents:,} documents"
        share = train_fraction(data.split) if data.data_path else 1.0
        if iterations and share and corpus.tokens and not data.weight_by_num_documents:
            epochs = iterations * tokens_per_step(config) * weight / sum(weights) / (corpus.tokens * share)
            text += f", {share:.1%} of them for training: {epochs:.3g} epochs"
        rows.append(("data", text))
    return rows


def _model(config: Config) -> list[tuple[str, str]]:
    model = config.model
    size, known = vocabulary_size(config)
    padded = accounting.padded_vocab_size(size, model.make_vocab_size_divisible_by, config.parallel.model_parallel_size)
    total = accounting.num_parameters(model, padded)
    rest = accounting.num_non_embedding_parameters(model)
    flops = accounting.flops_per_token(model, padded, causal=True)
    guess = "" if known else ", a guess: the tokenizer's file is not here"
    rows, columns, gated = accounting.mlp_shape(model)
    return [
        ("vocabulary", f"{size:,} padded to {padded:,}{guess}"),
        ("parameters", f"{total:,} ({rest:,} without embeddings and head)"),
        ("head and MLP", f"{model.hidden_size // model.num_attention_heads} features per head, MLP {columns:,} wide"
                         f"{f' (gated, {rows:,} rows)' if gated else ''}"),
        ("training FLOPs", f"{_count(flops)} per token (causal attention counted half)"),
    ]  # fmt: skip


def vocabulary_size(config: Config) -> tuple[int, bool]:
    """Return (token ids of the tokenizer, whether that is known rather than the usual GPT-2 size).

    Raises ConfigError where the tokenizer's file is here and is none."""
    kind, file = config.tokenizer.tokenizer_type, config.tokenizer.vocab_file
    if kind == "HFTokenizer" and file and Path(file).is_file():
        count = count_tokens(file)
        if isinstance(count, Problem):
            raise ConfigError(count)
        return count, True
    is_known = kind in _KNOWN_VOCABULARIES and (file is not None or kind != "GPT2BPETokenizer")
    return _KNOWN_VOCABULARIES.get(kind, _USUAL_VOCABULARY), is_known


def _rates(config: Config) -> list[tuple[str, str]]:
    """Return the learning rate at the landmarks of the run."""
    iterations, optimizer = config.training.train_iters, config.optimizer
    if iterations is None:
        return []
    horizon = decay_horizon(optimizer, iterations)
    steps = {0, round(optimizer.warmup * horizon), *(round(iterations * part) for part in (0.25, 0.5, 0.75, 1))}
    points = [f"{learning_rate(optimizer, iterations, step):.3g} at {step:,}" for step in sorted(steps)]
    return [("learning rate", ", ".join(points))]


def _count(number: float) -> str:
    """Return a large number with a word: 20.97 billion."""
    for size, word in ((1e15, "quadrillion"), (1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.4g} {word}"
    return f"{number:,.0f}"
