"""From the config to the documents of each part: which files, which range of them, which share, how many samples.

Nothing is read but the .idx files, so `summaries(config)` tells a run's epochs before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron import logs
from megatron.config.schema.config import Config
from megatron.config.split import split_shares
from megatron.data.blend import normalised, requested_per_dataset, weights_by_documents
from megatron.data.documents import Documents
from megatron.data.indexed import IndexedDataset
from megatron.data.split import PARTS, RunLength, boundaries, requested_samples
from megatron.errors import ConfigError, DataError, Problem

logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Member:
    """One data set of a part. weight: its share of the part. num_samples: what to ask of it, None for one epoch."""

    part: str
    documents: Documents
    weight: float
    num_samples: int | None

    @property
    def prefix(self) -> str:
        """The path of the token file."""
        return self.documents.text.prefix


@dataclass(frozen=True)
class Summary:
    """What a run reads of one data set. epochs: how often each of its tokens is seen, on average."""

    part: str
    prefix: str
    num_documents: int
    num_tokens: int
    epochs: float

    def __str__(self) -> str:
        tokens = f"{self.num_tokens / 1e6:,.1f} M" if self.num_tokens >= 1e5 else f"{self.num_tokens:,}"
        return (
            f"{self.part}: {self.num_documents:,} documents, {tokens} tokens, {self.epochs:.3g} epochs of {self.prefix}"
        )


def find_members(config: Config) -> dict[str, list[Member]]:
    """Return the data sets of each part ("train", "valid", "test"); a part without any is not there.

    Raises ConfigError where a part has no documents, DataError for files that are missing, damaged or too small.
    """
    if config.data.train_data_paths is None:
        if config.data.data_path is None:
            fix = "Set data_path: data/corpus_text_document, or train_data_paths to a list of such prefixes."
            raise ConfigError(Problem(what="data_path", why="there is nothing to train on.", fix=fix))
        return _split_members(config, config.data.data_path)
    return {part: members for part in PARTS if (members := _listed_members(config, part))}


def summaries(config: Config, members: dict[str, list[Member]] | None = None) -> list[Summary]:
    """Return what the run will read of each data set, parts and files in order."""
    found = find_members(config) if members is None else members
    return [_summary(config, member) for part in found.values() for member in part]


def wanted_samples(config: Config) -> dict[str, int | None]:
    """The samples that each part must yield over the run; None for all of an epoch (train_epochs)."""
    training = config.training
    if training.train_iters is None:
        return dict.fromkeys(PARTS)
    run = RunLength(training.train_iters, config.batch.train_batch_size, training.eval_interval, training.eval_iters)
    return dict(requested_samples(run))


def _split_members(config: Config, prefix: str) -> dict[str, list[Member]]:
    """One file, divided into parts by documents."""
    weights = split_shares(config.data.split)
    documents = Documents.whole(_open(config, "data_path", prefix))
    ends = boundaries(weights, len(documents))
    wanted = wanted_samples(config)
    members = {}
    for number, part in enumerate(PARTS):
        chosen = documents.part(ends[number], ends[number + 1])
        needed = part == "train" or (part == "valid" and weights[number] > 0 and config.training.eval_iters > 0)
        if needed and len(chosen) <= 0 and not (config.optimizer.neox_compat and part == "valid"):
            raise _empty_part(config, part, len(documents))
        if len(chosen) > 0 and wanted[part] != 0:
            members[part] = [Member(part, chosen, 1.0, wanted[part])]
    return _checked(config, members)


def _listed_members(config: Config, part: str) -> list[Member]:
    """The files of one part, with their weights."""
    paths: list[str] | None = getattr(config.data, f"{part}_data_paths")
    label_paths: list[str] | None = getattr(config.data, f"{part}_label_data_paths")
    weights: list[float] | None = getattr(config.data, f"{part}_data_weights")
    wanted = wanted_samples(config)[part]
    if not paths or wanted == 0:
        return []
    files = [_open(config, f"{part}_data_paths", path) for path in paths]
    labels = [_open(config, f"{part}_label_data_paths", path) for path in label_paths or []]
    shares = _shares(config, weights, files)
    counts: Sequence[int | None] = [None] * len(paths) if wanted is None else requested_per_dataset(wanted, shares)
    members = [
        Member(part, Documents.whole(file, labels[number] if labels else None), shares[number], counts[number])
        for number, file in enumerate(files)
    ]
    return _checked(config, {part: members})[part]


def _shares(config: Config, weights: list[float] | None, files: Sequence[IndexedDataset]) -> list[float]:
    if config.data.weight_by_num_documents:
        alpha, neox_compat = config.data.weighted_sampler_alpha, config.optimizer.neox_compat
        return weights_by_documents([len(file) for file in files], alpha, neox_compat)
    return normalised(weights or [1.0] * len(files))


def _checked(config: Config, members: dict[str, list[Member]]) -> dict[str, list[Member]]:
    """Raise DataError for a data set without tokens, or for training with less than one sample."""
    seq_length = config.model.seq_length
    for member in (member for part in members.values() for member in part):
        tokens, documents = member.documents.num_tokens, len(member.documents)
        counted = f"its {documents:,} documents for {member.part} hold {tokens:,} tokens"
        too_short = member.part == "train" and config.data.pack_impl == "packed" and tokens <= seq_length
        if tokens == 0 or (too_short and not config.optimizer.neox_compat):
            why = f"{counted}, but a sample takes seq_length + 1 = {seq_length + 1:,}."
            fix = f"Use more text, give {member.part} a larger share of `split`, or set a smaller seq_length."
            raise DataError(Problem(what=member.prefix, why=why, fix=fix))
        if tokens <= seq_length and config.data.pack_impl == "packed":
            logger.warning(
                "%s: %s, less than one sample of %d; it is repeated.", member.prefix, counted, seq_length + 1
            )
    return members


def _summary(config: Config, member: Member) -> Summary:
    documents = member.documents
    training = config.training
    if member.num_samples is None:
        epochs = float(training.train_epochs or 1) if member.part == "train" else 1.0
    elif config.data.pack_impl == "packed":
        total = wanted_samples(config)[member.part] or 0
        epochs = total * member.weight * config.model.seq_length / documents.num_tokens
    elif config.data.pack_impl == "unpacked":
        epochs = member.num_samples / len(documents)
    else:
        fitting = max(1, documents.num_tokens // (config.model.seq_length + 1))
        epochs = member.num_samples / fitting
    return Summary(member.part, member.prefix, len(documents), documents.num_tokens, epochs)


def _open(config: Config, key: str, prefix: str) -> IndexedDataset:
    try:
        return IndexedDataset(prefix, warmup=config.data.mmap_warmup)
    except DataError as error:
        named = (replace(problem, what=_named(key, prefix, problem.what)) for problem in error.problems)
        raise DataError(*named) from None


def _named(key: str, prefix: str, what: str) -> str:
    """Return the key and its value, with the file that is meant where it is not the value itself."""
    return f"{key} = {prefix}" if what == prefix else f"{key} = {prefix}: {what}"


def _empty_part(config: Config, part: str, num_documents: int) -> ConfigError:
    what = f'split = "{config.data.split}"'
    why = f"of the {num_documents:,} documents of {config.data.data_path} it leaves none for {part}."
    fix = 'Give it a larger share, for example split: "90, 5, 5"'
    if part == "valid":
        fix += ", or do without validation: eval_iters: 0"
    return ConfigError(Problem(what=what, why=why, fix=fix + "."))
