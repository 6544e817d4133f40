"""Every token batch that GPT-NeoX yielded, bit for bit, and its own index arrays."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megatron.config.resolve import resolve
from megatron.data.build import DataSets, build_datasets
from megatron.data.gpt import SampleReader
from megatron.data.loaders import BatchLoader, build_loader
from megatron.data.sampler import Layout
from megatron.data.samples import SampleIndex

CASES = [
    "packed_basic",
    "packed_train_only",
    "packed_int32_tokens",
    "packed_long_seq",
    "packed_labels",
    "blend2",
    "blend_by_num_docs",
    "train_epochs2",
    "overflow",
    "overflow_labels_s2",
    "overflow_labels_s3",
    "overflow_nochop_s1",
    "overflow_nochop_s2",
    "overflow_nochop_s3",
    "unpacked_labels",
]
PATH_KEYS = (
    "data_path",
    *(f"{part}{kind}_paths" for part in ("train", "valid", "test") for kind in ("_data", "_label_data")),
)


class Case:
    """A recorded run of GPT-NeoX and our data sets for the same settings."""

    def __init__(self, golden: Path, name: str, **overrides: object) -> None:
        folder = golden / "data_order"
        record = json.loads((folder / "cases.json").read_text())["cases"][name]
        settings = dict(record["settings"])
        for key in PATH_KEYS & settings.keys():
            value = settings[key]
            inputs = folder / "inputs"
            settings[key] = str(inputs / value) if isinstance(value, str) else [str(inputs / path) for path in value]
        self.settings = settings
        self.dp, self.lengths, self.train_iters = record["dp"], record["lens"], record["train_iters"]
        self.batches, self.index = np.load(folder / f"{name}.npz"), np.load(folder / f"{name}.index.npz")
        flat = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 512}
        self.config = resolve({**flat, **settings, "neox_compat": True, **overrides}, world_size=self.dp)
        self.datasets: DataSets = build_datasets(self.config, vocab_size=100000)

    def layout(self, rank: int) -> Layout:
        return Layout(self.settings["train_micro_batch_size_per_gpu"], rank, self.dp)

    def read(self, part: str, key: str, numbers: np.ndarray) -> np.ndarray:
        """[steps, ranks, rows, seq_length + 1]: what the ranks read at the micro-batches `numbers`."""
        dataset: SampleReader = getattr(self.datasets, part)
        ranks = []
        for rank in range(self.dp):
            layout = self.layout(rank)
            chosen = [layout.indices(0, number, len(dataset)) for number in numbers.tolist()]
            samples = [dataset.read(indices) for indices in chosen]
            ranks.append(np.stack([sample.text if key == "text" else sample.labels for sample in samples]))
        return np.stack(ranks, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_of_gpt_neox(golden: Path, name: str) -> None:
    case = Case(golden, name)
    compared = 0
    for entry in case.batches.files:
        part, key, *rest = entry.split(".") if "." in entry else (entry, "", "")
        if rest != [] or key == "len" or part.startswith("resume"):
            continue
        numbers = case.batches[f"{entry}.step"]
        np.testing.assert_array_equal(case.read(part, key, numbers), case.batches[entry])
        compared += 1
    assert compared >= 1


@pytest.mark.parametrize("name", CASES)
def test_resumed_batches_are_those_of_gpt_neox(golden: Path, name: str) -> None:
    case = Case(golden, name)
    accumulation = case.config.batch.gradient_accumulation_steps
    iteration = case.train_iters // 2
    begins = {
        "train": iteration * accumulation,
        "valid": iteration * accumulation // case.settings["eval_interval"] * case.settings["eval_iters"],
    }
    for part, begin in begins.items():
        for key in ("text", "label"):
            if f"resume_{part}.{key}" in case.batches.files:
                epoch = len(getattr(case.datasets, part)) // case.layout(0).micro_batch_samples
                numbers = begin % epoch + np.arange(2)
                numbers = numbers[numbers < epoch]  # past it GPT-NeoX repeats what it has seen since it resumed
                recorded = case.batches[f"resume_{part}.{key}"][: len(numbers)]
                np.testing.assert_array_equal(case.read(part, key, numbers), recorded)


@pytest.mark.parametrize("name", CASES)
def test_lengths_are_those_of_gpt_neox(golden: Path, name: str) -> None:
    case = Case(golden, name)
    assert case.datasets.train_iters == case.train_iters
    for entry, batches in case.lengths.items():
        dataset = getattr(case.datasets, entry.split(".")[0])
        assert len(dataset) // case.layout(0).micro_batch_samples == batches


@pytest.mark.parametrize("name", CASES)
def test_index_arrays_are_those_of_gpt_neox(golden: Path, name: str) -> None:
    case = Case(golden, name)
    readers = {part: getattr(case.datasets, part) for part in ("train", "valid", "test")}
    members = {}
    for part, reader in readers.items():
        for number, member in enumerate(getattr(reader, "datasets", [reader] if reader else [])):
            members[f"_{part}_{number}_indexmap"] = members[f"_{part}_indexmap"] = member
    compared = 0
    for label, member in members.items():
        for entry in [file for file in case.index.files if label in file]:
            _compare_index(member.index, member.documents.start, entry, case.index[entry])
            compared += 1
    assert compared >= 3


def _compare_index(ours: SampleIndex, first_document: int, entry: str, theirs: np.ndarray) -> None:
    """GPT-NeoX ends its overflow index within the last sample, which it replaces by the first while reading."""
    overflow = "overflow" in entry
    if entry.endswith("doc_idx"):
        found = ours.documents[: len(theirs)] if overflow else ours.documents
        np.testing.assert_array_equal(found + first_document, theirs)
    elif entry.endswith("sample_idx"):
        end = -1 if overflow else None
        np.testing.assert_array_equal(np.stack([ours.positions, ours.offsets], axis=1)[:end], theirs[:end])
    else:
        replaced = np.where(theirs == theirs.max(), theirs[0], theirs) if overflow else theirs
        np.testing.assert_array_equal(ours.order, replaced)


@pytest.mark.parametrize("name", ["train_epochs2", "blend2", "packed_labels"])
def test_loader_delivers_the_recorded_batches(golden: Path, name: str) -> None:
    case = Case(golden, name)
    accumulation = case.config.batch.gradient_accumulation_steps
    texts, steps = case.batches["train.text"], case.batches["train.text.step"].tolist()
    for rank in range(case.dp):
        with build_loader(case.config, case.datasets.train, dp_rank=rank, dp_size=case.dp) as loader:
            delivered = [batch for _, step in zip(range(20 // accumulation), loader, strict=False) for batch in step]
        for number, batch in enumerate(delivered):
            row = steps.index(number)
            np.testing.assert_array_equal(batch.tokens.numpy(), texts[row, rank, :, :-1])
            if "train.label" in case.batches.files:
                label = case.batches["train.label"][row, rank, :, 1:]
                np.testing.assert_array_equal(batch.labels.numpy(), np.maximum(label, 0))
                np.testing.assert_array_equal(batch.loss_mask.numpy(), (label >= 0).astype(np.float32))
            else:
                np.testing.assert_array_equal(batch.labels.numpy(), texts[row, rank, :, 1:])
                assert batch.loss_mask.all()


def test_validation_windows_continue_through_the_set(golden: Path) -> None:
    case = Case(golden, "packed_basic")
    loader = BatchLoader(case.datasets.valid, 4, num_workers=0)
    delivered = [step[0].tokens.numpy() for window in (0, 2) for step in loader.window(window, 2)]
    np.testing.assert_array_equal(np.stack(delivered), case.batches["valid.text"][:4, 0, :, :-1])


def test_documents_of_validation_do_not_leak_unless_asked(golden: Path) -> None:
    leaking, honest = Case(golden, "overflow"), Case(golden, "overflow", neox_compat=False)
    train = range(leaking.datasets.train.documents.start, leaking.datasets.train.documents.stop)
    assert leaking.datasets.valid.documents.start in train
    assert honest.datasets.valid.documents.start not in train
    text = honest.datasets.valid.documents.text
    allowed = {text[number][0] for number in range(270, 285) if len(text[number])}
    assert {row[0] for row in honest.datasets.valid.read(np.arange(24)).text.tolist()} <= allowed


def test_training_packed_to_overflow_is_the_same_without_the_leak(golden: Path) -> None:
    recorded = Case(golden, "overflow")
    fixed = Case(golden, "overflow", neox_compat=False)
    expected = recorded.read("train", "text", np.arange(39))
    found = fixed.read("train", "text", np.arange(39))
    rows_that_differ = (expected != found).any(axis=-1).sum()
    assert rows_that_differ <= 1  # GPT-NeoX replaces its last sample by its first


@pytest.mark.parametrize("run", ["pythia_dp1", "pythia_eodmask", "pythia_dp2"])
def test_first_batches_of_recorded_training_runs(golden: Path, run: str) -> None:
    record = json.loads((golden / "train" / f"{run}.json").read_text())
    keys = {"seq_length", "split", "seed", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    keys |= {"train_iters", "eval_interval", "eval_iters"}
    settings = {key: record["config"][key] for key in keys} | {"max_position_embeddings": 64}
    settings |= {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    prefix = golden / "train" / "data" / "small_text_document"
    config = resolve({**settings, "data_path": str(prefix)}, world_size=record["world"])
    dataset = build_datasets(config).train
    with build_loader(config, dataset, dp_rank=record["rank"], dp_size=record["world"]) as loader:
        delivered = [batch.tokens.tolist() for step in islice(loader, 4) for batch in step]
    assert delivered[: len(record["first_tokens"])] == record["first_tokens"]
