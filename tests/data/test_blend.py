"""Blending: the parallel index against the loop, the weights, and reading."""

import time
from pathlib import Path

import numpy as np
import pytest

from megatron.data import blend, plain
from megatron.data.blend import BlendedDataset, blend_index, normalised, weights_by_documents
from megatron.data.gpt import GptDataset
from megatron.data.samples import packed_index
from tests.data.files import documents_of, write_documents

WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.7, 0.3],
    [1 / 3] * 3,
    [0.1] * 10,
    [0.9999, 0.0001],
    [0.2, 0.5, 0.3],
    normalised(np.random.RandomState(4).rand(12).tolist()),
    normalised((1.0 / np.arange(1, 30)).tolist()),
]


@pytest.mark.parametrize("lanes", [None, 1, 2, 37])
@pytest.mark.parametrize("weights", WEIGHTS, ids=range(len(WEIGHTS)))
def test_blend_equals_the_plain_loop(weights: list[float], lanes: int | None) -> None:
    for num_samples in (1, 2, 37, 3000):
        index = blend_index(weights, num_samples, lanes)
        assert index.choices.tolist() == plain.blend_choices(weights, num_samples)


def test_a_wrong_guess_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes that begin from nonsense are run again until each begins where the one before ended."""
    weights = [0.6, 0.3, 0.1]
    monkeypatch.setattr(blend, "_guess", lambda weights, numbers: np.zeros((3, numbers.size)))
    assert blend_index(weights, 2000, 9).choices.tolist() == plain.blend_choices(weights, 2000)


def test_more_than_256_data_sets() -> None:
    weights = normalised(np.random.RandomState(1).rand(300).tolist())
    index = blend_index(weights, 700)
    assert index.choices.tolist() == plain.blend_choices(weights, 700)
    assert index.choices.max() > 255


def test_locate_counts_what_was_taken() -> None:
    weights = [0.55, 0.25, 0.2]
    index = blend_index(weights, 5000)
    taken = [0, 0, 0]
    for number, choice in enumerate(index.choices.tolist()):
        assert index.locate(number) == (choice, taken[choice])
        taken[choice] += 1


def test_read_mixes_the_data_sets_in_order(tmp_path: Path) -> None:
    datasets = []
    for number, size in enumerate((300, 500)):
        documents = documents_of(write_documents(tmp_path / f"d{number}", [size], seed=number))
        datasets.append(GptDataset(documents, packed_index(documents.sizes(), 16, 1, 1), 16))
    index = blend_index([0.3, 0.7], len(datasets[0]) + len(datasets[1]))
    mixed = BlendedDataset(datasets, index)
    rows = np.array([0, 1, 2, 3, 4, len(mixed) - 1, len(mixed)])
    for row, text in zip(rows.tolist(), mixed.read(rows).text, strict=True):
        choice, sample = index.locate(row % len(mixed))
        np.testing.assert_array_equal(text, datasets[choice].read(np.array([sample])).text[0])


def test_weights_by_documents_follow_the_documentation() -> None:
    counts = [300, 120, 40]
    np.testing.assert_allclose(weights_by_documents(counts, 1.0), np.array(counts) / 460)
    np.testing.assert_allclose(weights_by_documents(counts, 0.0), [1 / 3] * 3)
    expected = np.array(counts) ** 0.3
    np.testing.assert_allclose(weights_by_documents(counts, 0.3), expected / expected.sum())


def test_weights_by_documents_of_gpt_neox() -> None:
    """With exponent 1 GPT-NeoX gives any two data sets equal weights."""
    np.testing.assert_allclose(weights_by_documents([900, 100], 1.0, neox_compat=True), [0.5, 0.5])
    assert weights_by_documents([7], 1.0, neox_compat=True) == [1.0]


def test_a_large_blend_is_not_a_loop() -> None:
    begin = time.perf_counter()
    index = blend_index([0.5, 0.3, 0.2], 2_000_000)
    assert time.perf_counter() - begin < 5
    np.testing.assert_allclose(np.bincount(index.choices) / 2e6, [0.5, 0.3, 0.2], atol=1e-5)
