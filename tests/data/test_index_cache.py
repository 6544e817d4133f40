"""Indices on disk: found again, never stale, whole or absent, and no file where none is worth it."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron.data import index_cache
from megatron.data.build import build_datasets
from megatron.data.index_cache import IndexCache
from tests.data.files import config_of, write_documents, write_labels


@pytest.fixture(autouse=True)
def _every_index_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SMALL_INDEX", 0)


class Builds:
    """Counts how often it is asked to build."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.count += 1
        return {"numbers": np.arange(10)}


def test_built_once_and_mapped(tmp_path: Path) -> None:
    builds = Builds()
    for _ in range(2):
        arrays = IndexCache(tmp_path).get({"seed": 1}, 10, builds)
        assert isinstance(arrays["numbers"], np.memmap)
        np.testing.assert_array_equal(arrays["numbers"], np.arange(10))
    assert builds.count == 1
    IndexCache(tmp_path).get({"seed": 2}, 10, builds)
    assert builds.count == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_small_indices_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SMALL_INDEX", 100)
    builds = Builds()
    IndexCache(tmp_path).get({}, 99, builds)
    assert (builds.count, list(tmp_path.iterdir())) == (1, [])


def test_only_the_builder_builds_and_all_wait(tmp_path: Path) -> None:
    builder, reader = Builds(), Builds()
    waits = []
    arrays = IndexCache(tmp_path, is_builder=True, barrier=lambda: waits.append("builder")).get({}, 10, builder)
    again = IndexCache(tmp_path, is_builder=False, barrier=lambda: waits.append("reader")).get({}, 10, reader)
    np.testing.assert_array_equal(arrays["numbers"], again["numbers"])
    assert (builder.count, reader.count, waits) == (1, 0, ["builder", "reader"])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    builds, other = Builds(), Builds()
    arrays = IndexCache(blocked / "cache").get({}, 10, builds)
    np.testing.assert_array_equal(arrays["numbers"], np.arange(10))
    IndexCache(blocked / "cache", is_builder=False).get({}, 10, other)
    assert (builds.count, other.count) == (1, 1)


def test_nothing_half_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while writing leaves no folder of the final name."""

    def die(path: Path, array: np.ndarray) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "_write_array", die)
        with pytest.raises(KeyboardInterrupt):
            IndexCache(tmp_path).get({}, 10, Builds())
    assert all(".tmp-" in path.name for path in tmp_path.iterdir())
    builds = Builds()
    np.testing.assert_array_equal(IndexCache(tmp_path).get({}, 10, builds)["numbers"], np.arange(10))
    assert builds.count == 1


def folders(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "index_cache").iterdir()}


def test_whatever_changes_the_order_makes_another_index(tmp_path: Path) -> None:
    """GPT-NeoX's file names omit the split and the data, and so it reuses stale indices."""
    prefix = write_documents(tmp_path / "text", [20] * 100)
    keys = {"data_path": prefix, "split": "80,20", "eval_iters": 0}
    seen: set[str] = set()
    changes = [{}, {"seed": 5}, {"split": "70,30"}, {"seq_length": 8}, {"train_iters": 500}]
    packings = [{"pack_impl": "unpacked"}, {"pack_impl": "pack_until_overflow"}]
    chopped = {
        "pack_impl": "pack_until_overflow",
        "allow_chopped": False,
        "seq_length": 24,
        "max_position_embeddings": 24,
    }
    for change in [*changes, *packings, chopped]:
        build_datasets(config_of(**{**keys, **change}))
        assert len(folders(tmp_path) - seen) == 1, change
        seen = folders(tmp_path)
    build_datasets(config_of(**keys))
    assert folders(tmp_path) == seen
    write_documents(tmp_path / "text", [20] * 99 + [21])
    build_datasets(config_of(**{**keys, "split": "100"}))
    assert len(folders(tmp_path) - seen) == 1


def test_changed_labels_make_another_index(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [20] * 50)
    keys = {"train_data_paths": [prefix], "train_label_data_paths": [str(tmp_path / "label")], "pack_impl": "unpacked"}
    for number, ignored in enumerate(({1}, {2})):
        write_labels(tmp_path / "label", prefix, ignored)
        os.utime(tmp_path / "label.bin", ns=(number, number))
        documents = build_datasets(config_of(**keys)).train.index.documents
        assert not ignored & set(documents.tolist())
    assert len(folders(tmp_path)) == 2


def test_mapped_indices_yield_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_documents(tmp_path / f"d{number}", [30 + number] * 60, seed=number) for number in range(2)]
    config = config_of(train_data_paths=paths, train_data_weights=[3, 1], data_index_dir=str(tmp_path / "chosen"))
    mapped = build_datasets(config).train.read(np.arange(40)).text
    assert len(list((tmp_path / "chosen").iterdir())) == 3
    monkeypatch.setattr(index_cache, "SMALL_INDEX", 1 << 20)
    np.testing.assert_array_equal(build_datasets(config).train.read(np.arange(40)).text, mapped)
