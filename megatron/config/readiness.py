"""What a run needs besides a config without mistakes: a layout that is built, a length, data, a tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron.config import combinations
from megatron.config.corpus import absent_files, read_corpus
from megatron.config.draft import show
from megatron.config.schema.config import Config
from megatron.config.tokenizer_file import count_tokens
from megatron.errors import ConfigError, Problem

_TOKENIZER_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "HFTokenizer": ("vocab_file",),
    "SPMTokenizer": ("vocab_file",),
    "TiktokenTokenizer": ("vocab_file",),
}
_ELSEWHERE = "Correct the path; or it may be on the machine that trains."


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
    kind = config.tokenizer.tokenizer_type
    return [
        Problem(key, f"tokenizer_type {kind} needs it.", f"Add {key}: <path>{_other_kind(kind)}")
        for key in _TOKENIZER_FILES.get(kind, ())
        if not getattr(config.tokenizer, key)
    ]


def _other_kind(kind: str) -> str:
    """Return what to do where the model's tokenizer is one file, while the kind is GPT-NeoX's default."""
    instead = "; where the tokenizer is a tokenizer.json, as of Pythia and 20B, set tokenizer_type: HFTokenizer and "
    return f"{instead}vocab_file: tokenizer.json" if kind == "GPT2BPETokenizer" else ""


def _data_prefixes(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, prefix) of every data set that the config names."""
    if config.data.data_path:
        yield "data_path", config.data.data_path
    for part in ("train", "valid", "test"):
        for key in (f"{part}_data_paths", f"{part}_label_data_paths"):
            for prefix in getattr(config.data, key) or []:
                yield key, prefix


def absent(config: Config) -> list[Problem]:
    """Return the files that the config names and that are not on this machine."""
    problems = []
    for key, prefix in _data_prefixes(config):
        files = absent_files(prefix)
        if files:
            listed = " and no ".join(str(file) for file in files)
            problems.append(Problem(f"{key} = {prefix}", f"there is no {listed} here.", _ELSEWHERE))
    kind = config.tokenizer.tokenizer_type
    for key in _TOKENIZER_FILES.get(kind, ()) if kind != "TiktokenTokenizer" else ():  # which may name an encoding
        file = getattr(config.tokenizer, key)
        if file and not Path(file).is_file():
            problems.append(Problem(f"{key} = {file}", "there is no such file here.", _ELSEWHERE))
    return problems


def broken(config: Config) -> list[Problem]:
    """Return the files that are on this machine and cannot be what the config takes them for."""
    found: list[object] = [
        read_corpus(prefix, key) for key, prefix in _data_prefixes(config) if not absent_files(prefix)
    ]
    file = config.tokenizer.vocab_file
    if config.tokenizer.tokenizer_type == "HFTokenizer" and file and Path(file).is_file():
        found.append(count_tokens(file))
    return [problem for problem in found if isinstance(problem, Problem)]
