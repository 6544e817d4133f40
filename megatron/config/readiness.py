"""What a run needs besides a config without mistakes: a layout that is built, a length, data, a tokenizer's files."""

from __future__ import annotations

from megatron.config import combinations
from megatron.config.draft import show
from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem


def runnable(config: Config) -> list[Problem]:
    """Return why this version cannot start the config on its mesh; such a config can still be checked and planned."""
    return [
        Problem(f"{refusal.key} = {show(refusal.value)}", refusal.why, refusal.fix)
        for refusal in combinations.refusals(config.flat(), built=False)
    ]


def require_ready(config: Config) -> None:
    """Raise ConfigError, before anything is built, where the config cannot be trained here."""
    missing = [*runnable(config), *trainable(config)]
    if missing:
        raise ConfigError(*missing)


def trainable(config: Config) -> list[Problem]:
    """Return what training needs and the config lacks: a length, data, and the tokenizer that made the data."""
    problems = []
    if config.training.train_iters is None and config.training.train_epochs is None:
        problems.append(Problem("train_iters", "nothing says how long to train.", "Add train_iters: 1000"))
    if not config.data.data_path and not config.data.train_data_paths:
        fix = "Add data_path: data/quickstart/python_text_document (or give configs/local_setup.yml as well)."
        problems.append(Problem("data_path", "no training data is named.", fix))
    return problems + tokenizer_files(config)


def tokenizer_files(config: Config) -> list[Problem]:
    """Return the files that the kind of tokenizer needs and the config does not name."""
    needs = {
        "GPT2BPETokenizer": ("vocab_file", "merge_file"),
        "HFTokenizer": ("vocab_file",),
        "SPMTokenizer": ("vocab_file",),
        "TiktokenTokenizer": ("vocab_file",),
    }
    kind = config.tokenizer.tokenizer_type
    return [
        Problem(key, f"tokenizer_type {kind} needs it.", f"Add {key}: <path>")
        for key in needs.get(kind, ())
        if not getattr(config.tokenizer, key)
    ]
