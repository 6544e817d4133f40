"""The data sets of a run, from its config: `build_datasets(config, ...)` -> train, valid, test, and its length.

Every rank calls it. Large indices are built by one rank and mapped by all; see `index_cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.config.schema.config import Config
from megatron.data.blend import BlendedDataset, BlendIndex, blend_index
from megatron.data.documents import Documents
from megatron.data.fitness import check_fitness, check_targets
from megatron.data.gpt import GptDataset, SampleReader
from megatron.data.index_cache import Arrays, IndexCache
from megatron.data.members import Member, Summary, find_members, summaries
from megatron.data.samples import (
    SampleIndex,
    check_usable,
    epochs_needed,
    neox_last_sample,
    overflow_index,
    packed_index,
    unpacked_index,
)
from megatron.whereabouts import Phase, enter


@dataclass(frozen=True)
class DataSets:
    """What a run reads. valid, test: None where the config has no documents for them, or eval_iters is 0.

    train_iters: optimizer steps of the run, from train_iters or train_epochs. summaries: one line per data set.
    train_order: a hash of all that the order of the training samples depends on; equal means the same order.
    """

    train: SampleReader
    valid: SampleReader | None
    test: SampleReader | None
    train_iters: int
    summaries: tuple[Summary, ...]
    train_order: str


def build_datasets(
    config: Config,
    *,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    is_builder: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> DataSets:
    """Open the data files, check that they fit the tokenizer, and lay out the samples.

    vocab_size: the tokenizer's entries, without padding. tokenizer_fingerprint: its sha256. None skips the check.
    is_builder: whether this rank writes indices that are not on disk yet (one rank per file system).
    barrier: waits for all ranks; every rank calls it equally often.

    Raises ConfigError for settings that contradict each other or the data, and DataError for files that are missing,
    damaged, too small, or made by another tokenizer.
    """
    found = find_members(config)
    readers: dict[str, SampleReader] = {}
    orders: dict[str, str] = {}
    for part, members in found.items():
        for member in members:
            enter(Phase.DATA_INDEX)  # each file is progress, for who watches for a hang
            check_fitness(member.documents.text, vocab_size, tokenizer_fingerprint)
            if member.documents.labels is not None:
                check_targets(member.documents.labels)
        cache = IndexCache(_index_folder(config, members[0]), is_builder, barrier)
        datasets = [_dataset(config, member, cache, vocab_size) for member in members]
        readers[part] = datasets[0] if len(datasets) == 1 else _blend(datasets, members, cache)
        orders[part] = cache.order()
    return DataSets(
        train=readers["train"],
        valid=readers.get("valid"),
        test=readers.get("test"),
        train_iters=_train_iters(config, len(readers["train"])),
        summaries=tuple(summaries(config, found)),
        train_order=orders["train"],
    )


def _train_iters(config: Config, num_samples: int) -> int:
    """The steps of the run; with train_epochs, the whole steps in that many passes over whole micro-batches."""
    if config.training.train_iters is not None:
        return config.training.train_iters
    accumulation = config.batch.gradient_accumulation_steps
    micro_batches = num_samples // (config.batch.train_batch_size // accumulation)
    return micro_batches * (config.training.train_epochs or 1) // accumulation


def _index_folder(config: Config, member: Member) -> Path:
    chosen = config.data.data_index_dir
    return Path(chosen) if chosen is not None else Path(member.prefix).parent / "index_cache"


def _dataset(config: Config, member: Member, cache: IndexCache, vocab_size: int | None) -> GptDataset:
    neox_compat = config.optimizer.neox_compat
    packing = config.data.pack_impl
    leaks = neox_compat and packing != "packed"  # GPT-NeoX takes the documents from the beginning of the file
    documents = member.documents.from_first() if leaks else member.documents
    enter(Phase.DATA_INDEX)
    index = PACKINGS[packing](config, documents, member.num_samples, cache)
    if neox_compat and packing == "pack_until_overflow":
        index = neox_last_sample(index)
    return GptDataset(documents, index, config.model.seq_length, vocab_size, neox_compat=neox_compat)


def _packed(config: Config, documents: Documents, num_samples: int | None, cache: IndexCache) -> SampleIndex:
    seq_length, seed = config.model.seq_length, config.numerics.seed
    epochs = 1 if num_samples is None else epochs_needed(documents.num_tokens, seq_length, num_samples)
    facts = {"packing": "packed", "sizes": documents.digest(), "seq_length": seq_length, "seed": seed, "epochs": epochs}
    entries = epochs * len(documents) + epochs * documents.num_tokens // seq_length
    build = lambda: packed_index(documents.sizes(), seq_length, seed, epochs).arrays()  # noqa: E731
    return SampleIndex.from_arrays(cache.get(facts, entries, build))


def _overflow(config: Config, documents: Documents, num_samples: int | None, cache: IndexCache) -> SampleIndex:
    def build() -> Arrays:
        usable = _usable(config, documents, config.model.seq_length + 1)
        sizes = documents.sizes()
        return overflow_index(sizes, config.model.seq_length, config.numerics.seed, num_samples, usable).arrays()

    entries = len(documents) + (num_samples or 0)
    return SampleIndex.from_arrays(cache.get(_facts(config, documents, num_samples), entries, build))


def _unpacked(config: Config, documents: Documents, num_samples: int | None, cache: IndexCache) -> SampleIndex:
    def build() -> Arrays:
        usable = _usable(config, documents, config.model.seq_length)
        return unpacked_index(len(documents), config.numerics.seed, num_samples, usable).arrays()

    entries = len(documents) + (num_samples or 0)
    return SampleIndex.from_arrays(cache.get(_facts(config, documents, num_samples), entries, build))


PACKINGS = {"packed": _packed, "pack_until_overflow": _overflow, "unpacked": _unpacked}


def _facts(config: Config, documents: Documents, num_samples: int | None) -> dict[str, object]:
    return {
        "packing": config.data.pack_impl,
        "sizes": documents.digest(),
        "seq_length": config.model.seq_length,
        "seed": config.numerics.seed,
        "samples": num_samples,
        "allow_chopped": config.data.allow_chopped,
    }


def _usable(config: Config, documents: Documents, labels_read: int) -> NDArray[np.bool_] | None:
    """Which documents have something to learn within `labels_read` tokens and, unless chopping is allowed, fit."""
    if config.data.allow_chopped and documents.labels is None:
        return None
    usable = np.ones(len(documents), np.bool_)
    if documents.labels is not None:
        usable &= documents.has_target(labels_read)
    if not config.data.allow_chopped:
        usable &= documents.sizes() <= config.model.seq_length + 1
    check_usable(usable, documents.text.prefix, config.model.seq_length)
    return usable


def _blend(datasets: list[GptDataset], members: list[Member], cache: IndexCache) -> BlendedDataset:
    weights = [member.weight for member in members]
    total = sum(len(dataset) for dataset in datasets)
    facts = {"packing": "blend", "weights": weights, "samples": total}

    def build() -> Arrays:
        return blend_index(weights, total).arrays()

    return BlendedDataset(datasets, BlendIndex.from_arrays(cache.get(facts, total, build)))
