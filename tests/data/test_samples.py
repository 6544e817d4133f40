"""The vectorised indices against plain loops, over document sizes that include empty and very long ones."""

import numpy as np
import pytest

from megatron.data import plain, samples
from megatron.data.samples import SampleIndex, epochs_needed, overflow_index, packed_index, unpacked_index

SHAPES = [(1, 5), (2, 1), (7, 3), (40, 16), (300, 64), (300, 1)]


def random_sizes(num_documents: int, seed: int, largest: int = 90) -> np.ndarray:
    generator = np.random.RandomState(seed)
    sizes = generator.randint(0, largest, num_documents).astype(np.int32)
    sizes[generator.rand(num_documents) < 0.15] = 0
    sizes[0] += 1
    return sizes


def rows(index: SampleIndex) -> list[tuple[int, int]]:
    return list(zip(index.positions.tolist(), index.offsets.tolist(), strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("num_documents", "seq_length"), SHAPES)
def test_packed_equals_the_plain_loop(
    num_documents: int, seq_length: int, epochs: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "CHUNK_DOCUMENTS", chunk)
    for seed in range(5):
        sizes = random_sizes(num_documents, seed)
        index = packed_index(sizes, seq_length, seed, epochs)
        documents, expected = plain.packed_rows(sizes.tolist(), seq_length, seed, epochs)
        assert index.documents.tolist() == documents
        assert rows(index) == expected
        assert sorted(index.order.tolist()) == list(range(len(expected) - 1))


@pytest.mark.parametrize("share_usable", [1.0, 0.6])
@pytest.mark.parametrize(("num_documents", "seq_length"), SHAPES)
def test_overflow_equals_the_plain_loop(num_documents: int, seq_length: int, share_usable: float) -> None:
    for seed in range(5):
        sizes = random_sizes(num_documents, seed)
        usable = np.random.RandomState(seed).rand(num_documents) < share_usable
        usable[0] = True
        for num_samples in (1, 3, num_documents, 4 * num_documents):
            index = overflow_index(sizes, seq_length, seed, num_samples, usable)
            documents, starts = plain.overflow_rows(sizes.tolist(), seq_length, seed, num_samples, usable.tolist())
            assert index.documents.tolist() == documents
            assert index.positions.tolist() == starts
            assert sorted(index.order.tolist()) == list(range(num_samples))


def test_one_pass_of_overflow_holds_every_document_once() -> None:
    sizes = random_sizes(200, seed=3)
    index = overflow_index(sizes, 64, seed=5, num_samples=None)
    assert sorted(index.documents[:-1].tolist()) == list(range(200))
    assert index.positions[-1] == 200
    assert index.documents[-1] == index.documents[0]


def test_unpacked_repeats_the_usable_documents_in_file_order() -> None:
    usable = np.array([True, False, True, True])
    index = unpacked_index(4, seed=1, num_samples=7, usable=usable)
    assert index.documents.tolist() == [0, 2, 3, 0, 2, 3, 0, 2]
    assert sorted(index.order.tolist()) == list(range(7))
    assert unpacked_index(4, seed=1, num_samples=None, usable=usable).order.size == 3


@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 100])
def test_epochs_needed_is_the_least_number(num_tokens: int, num_samples: int) -> None:
    epochs = epochs_needed(num_tokens, 16, num_samples)
    assert (epochs * num_tokens - 1) // 16 >= num_samples
    assert epochs == 1 or ((epochs - 1) * num_tokens - 1) // 16 < num_samples


def test_positions_beyond_32_bits_are_exact() -> None:
    """8 documents of 2 ** 30 tokens: samples lie past token 2 ** 31, and nothing wraps."""
    sizes = np.full(8, 2**30, np.int32)
    seq_length = 2**22
    index = packed_index(sizes, seq_length, seed=1, epochs=1)
    tokens = index.positions * 2**30 + index.offsets
    np.testing.assert_array_equal(tokens, np.arange(index.order.size + 1) * seq_length)
    assert tokens[-1] > 2**32


def test_an_index_past_the_end_wraps_as_in_gpt_neox() -> None:
    index = packed_index(np.array([40], np.int32), 4, seed=1, epochs=1)
    assert (index.order.size, len(index)) == (9, 8)
    found = index.rows(np.array([7, 8, 9, 10]))
    assert found.tolist() == [index.order[7], index.order[8], index.order[1], index.order[2]]
