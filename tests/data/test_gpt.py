"""Reading samples against joining documents one token at a time."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from megatron.data import gpt
from megatron.data.gpt import GptDataset
from megatron.data.samples import SampleIndex, overflow_index, packed_index, unpacked_index
from megatron.errors import DataError
from tests.data.files import documents_of, write_documents, write_labels

SIZES = [5, 0, 1, 33, 7, 0, 120, 2, 2, 9, 64, 1, 30]


def joined(documents: list[list[int]], index: SampleIndex, row: int, width: int) -> list[int]:
    """The tokens of a sample, by the definition of SampleIndex."""
    first, last = index.positions[row], index.positions[row + 1]
    tokens: list[int] = []
    for position in range(first, last + 1):
        document = documents[index.documents[position]]
        begin = index.offsets[row] if position == first else 0
        end = index.offsets[row + 1] + 1 if position == last else len(document)
        tokens += document[begin:end]
    return tokens[:width]


@pytest.mark.parametrize("mean_piece", [0, 1 << 40], ids=["slices", "gather"])
@pytest.mark.parametrize("packing", ["packed", "overflow", "unpacked"])
def test_read_equals_joining_documents(
    tmp_path: Path, packing: str, mean_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "MEAN_PIECE_TO_SLICE", mean_piece)
    prefix = write_documents(tmp_path / "text", SIZES)
    documents = documents_of(prefix, write_labels(tmp_path / "label", prefix, {4})).part(2, 12)
    sizes = documents.sizes()
    index = {
        "packed": packed_index(sizes, 16, 3, 2),
        "overflow": overflow_index(sizes, 16, 3, 20),
        "unpacked": unpacked_index(len(documents), 3, 20),
    }[packing]
    dataset = GptDataset(documents, index, 16)
    indices = np.random.RandomState(0).permutation(len(dataset))
    samples = dataset.read(indices)
    texts = [documents.text[number].tolist() for number in range(2, 12)]
    labels = [documents.labels[number].tolist() for number in range(2, 12)]
    for row, found, found_labels in zip(index.rows(indices), samples.text, samples.labels, strict=True):
        expected, expected_labels = joined(texts, index, row, 17), joined(labels, index, row, 17)
        assert found.tolist() == expected + [0] * (17 - len(expected))
        assert found_labels.tolist() == expected_labels + [-100] * (17 - len(expected_labels))


def test_padding_is_not_trained_on(tmp_path: Path) -> None:
    documents = documents_of(write_documents(tmp_path / "text", [5, 20, 3]))
    index = unpacked_index(3, 0, 3)
    samples = GptDataset(documents, index, 16).read(np.arange(3))
    for row, text, labels in zip(index.rows(np.arange(3)), samples.text, samples.labels, strict=True):
        filled = min(17, [5, 20, 3][row] + 1)
        assert labels[:filled].tolist() == text[:filled].tolist()
        assert (labels[filled:] == -100).all()
    assert GptDataset(documents, index, 16, neox_compat=True).read(np.arange(3)).labels is None


def test_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [40], vocab_size=500)
    index = packed_index(np.array([40], np.int32), 16, 0, 1)
    with pytest.raises(
        DataError, match=r"token id \d+ in .*text.bin: the tokenizer's vocabulary has 10 entries, ids 0"
    ):
        GptDataset(documents_of(prefix), index, 16, vocab_size=10).read(np.arange(1))


def test_labels_must_be_parallel(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [4, 6])
    fewer = write_documents(tmp_path / "fewer", [4])
    other = write_documents(tmp_path / "other", [4, 5])
    with pytest.raises(DataError, match=r"labels .*fewer: 1 documents, but .*text has 2"):
        documents_of(prefix, fewer)
    with pytest.raises(DataError, match=r"labels .*other: document 1 has 5 labels, but 6 tokens in .*text"):
        documents_of(prefix, other)


@pytest.mark.parametrize("chunk", [1, 20, 1 << 24])
def test_documents_without_a_target(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.documents.CHUNK_TOKENS", chunk)
    prefix = write_documents(tmp_path / "text", SIZES)
    documents = documents_of(prefix, write_labels(tmp_path / "label", prefix, {3, 6})).part(1, 13)
    for read in (1, 2, 17):
        labels = [documents.labels[number][:read] for number in range(1, 13)]
        expected = [bool((document != -100).any()) for document in labels]
        assert documents.has_target(read).tolist() == expected


def test_advice_covers_the_pieces_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range is told to the kernel before it is read, from the page it begins in to its last byte."""
    text = documents_of(write_documents(tmp_path / "text", [5000, 1, 9000])).text
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(type(text), "_advise", lambda self, *advice: told.append(advice))
    text.expect_random_reads()
    text.will_need([0, 5001], [5000, 7])
    page = mmap.PAGESIZE
    assert told == [("MADV_RANDOM", [(0, 28002)]), ("MADV_WILLNEED", [(0, 10000), (10002 // page * page, 10016)])]


def test_advice_is_taken_by_the_system(tmp_path: Path) -> None:
    text = documents_of(write_documents(tmp_path / "text", [5000, 1, 9000])).text
    text.expect_random_reads()
    text.will_need([0, 14000], [5000, 1])
    write_documents(tmp_path / "empty", [])
    documents_of(str(tmp_path / "empty")).text.expect_random_reads()
