"""The MMIDIDX format against bytes written out by hand, recorded GPT-NeoX files, and every kind of damage."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import indexed
from megatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megatron.errors import DataError

CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<f4": 6, "<f8": 7, "<u2": 8}


def written_by_hand(documents: list[list[int]], dtype: str) -> tuple[bytes, bytes]:
    """The two files, from the table of the format with struct alone."""
    width = np.dtype(dtype).itemsize
    sizes = [len(document) for document in documents]
    pointers = [width * sum(sizes[:index]) for index in range(len(sizes))]
    bounds = list(range(len(documents) + 1))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<QQ", len(sizes), len(bounds))
    index += struct.pack(f"<{len(sizes)}i", *sizes)
    index += struct.pack(f"<{len(sizes)}q", *pointers) + struct.pack(f"<{len(bounds)}q", *bounds)
    letter = {"u1": "B", "i1": "b", "<i2": "h", "<i4": "i", "<i8": "q", "<f4": "f", "<f8": "d", "<u2": "H"}[dtype]
    tokens = b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents)
    return tokens, index


def both_files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


DOCUMENTS = [[5, 0, 7], [], [1], [120, 3, 4, 100, 2]]


@pytest.mark.parametrize("dtype", CODES)
def test_bytes_are_those_of_the_format(tmp_path: Path, dtype: str) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS, np.dtype(dtype))
    assert both_files(prefix) == written_by_hand(DOCUMENTS, dtype)
    dataset = IndexedDataset(prefix)
    assert [document.tolist() for document in dataset] == DOCUMENTS
    assert dataset.dtype == np.dtype(dtype)


def test_many_at_once_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    filled = [document for document in DOCUMENTS if document]
    one_by_one = write(tmp_path / "a", filled)
    with IndexedWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_documents(np.array(filled[0] + filled[1], np.uint32), np.array([3, 1]))
        writer.add_documents(np.array(filled[2], np.int64), np.array([5]))
        writer.add_documents(np.zeros(0, np.uint16), np.zeros(0, np.int64))
    assert both_files(one_by_one) == both_files(tmp_path / "b")


def test_documents_without_tokens_have_no_item(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3], np.uint16), np.array([0, 2, 0, 0, 1, 0]))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.sizes.tolist() == [2, 1]
    assert dataset.doc_idx.tolist() == [0, 0, 1, 1, 1, 2, 2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = write(tmp_path_factory.mktemp("round") / "x", documents)
    assert both_files(prefix) == written_by_hand(documents, "<u2")
    dataset = IndexedDataset(prefix, warmup=True)
    assert [dataset[index].tolist() for index in range(len(dataset))] == documents
    assert dataset.num_tokens == sum(map(len, documents))
    assert dataset.num_documents == len(documents)


def test_get_slices_without_copying(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", DOCUMENTS))
    assert dataset.get(3, 1, 2).tolist() == [3, 4]
    assert dataset.get(3, 3).tolist() == [100, 2]
    assert dataset.get(-1, 0, 99).tolist() == DOCUMENTS[-1]
    assert np.shares_memory(dataset.get(3, 1), dataset[3])
    assert not dataset[3].flags.writeable
    with pytest.raises(IndexError, match=r"item 4 of .* has 4 items"):
        dataset[4]


def test_another_process_opens_the_files_anew(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", DOCUMENTS))
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert [document.tolist() for document in pickle.loads(data)] == DOCUMENTS


def test_files_of_gpt_neox_are_read_and_written_the_same(golden: Path, tmp_path: Path) -> None:
    found = sorted(golden.glob("data_order/inputs/*.idx")) + sorted(golden.glob("train/data/*.idx"))
    assert len(found) >= 12
    for path in found:
        prefix = path.with_suffix("")
        dataset = IndexedDataset(prefix)
        with IndexedWriter(tmp_path / path.stem, dataset.dtype) as writer:
            for item in dataset:
                writer.add_document(item)
        assert both_files(tmp_path / path.stem) == both_files(prefix)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(None, "i4"), (50257, "u2"), (65499, "u2"), (65500, "i4"), (256000, "i4")]
)
def test_dtype_by_vocabulary(vocab_size: int | None, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(f"<{dtype}")


@pytest.mark.parametrize(("code", "dtype"), [(6, "<f8"), (7, "<f4"), (6, "<f4"), (7, "<f8")])
def test_float_codes_are_told_apart_by_the_length(tmp_path: Path, code: int, dtype: str) -> None:
    values = [[0.5, -1.25], [3.0]]
    tokens, index = written_by_hand(values, dtype)  # type: ignore[arg-type]
    (tmp_path / "x.bin").write_bytes(tokens)
    (tmp_path / "x.idx").write_bytes(index[:17] + bytes([code]) + index[18:])
    assert [item.tolist() for item in IndexedDataset(tmp_path / "x")] == values


def test_merged_files_without_documents_are_read(tmp_path: Path) -> None:
    tokens, index = written_by_hand([[1, 2], [3]], "<u2")
    (tmp_path / "x.bin").write_bytes(tokens)
    (tmp_path / "x.idx").write_bytes(index[:26] + struct.pack("<Q", 1) + index[34 : 34 + 24] + struct.pack("<q", 0))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.doc_idx.tolist() == [0]
    assert dataset[1].tolist() == [3]


def damage(prefix: Path, suffix: str, change: Any) -> None:
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (
            "bin",
            lambda data: data[:-4],
            r"x.bin: is truncated: 14 bytes, but the .idx lists 9 tokens of 2 bytes = 18 bytes",
        ),
        ("bin", lambda data: b"", r"x.bin: is truncated: 0 bytes"),
        ("bin", lambda data: data + b"ab", r"x.bin: has 20 bytes, but the sizes in the .idx sum to 9 tokens = 18"),
        ("idx", lambda data: data[:-3], r"x.idx: is truncated: 119 bytes, but 4 items need 122"),
        ("idx", lambda data: data + b"\0", r"x.idx: is too long: 123 bytes, but 4 items need 122"),
        ("idx", lambda data: data[:20], r"x.idx: is truncated within its header \(20 bytes\)"),
        ("idx", lambda data: b"", r"x.idx: is not a token index: it begins with b''"),
        (
            "idx",
            lambda data: b"TNTIDX\0\0" + data[8:],
            r"x.idx: is in the legacy TNTIDX format .* Convert it to MMIDIDX",
        ),
        ("idx", lambda data: b"PK\x03\x04" + data[4:], r"x.idx: is not a token index: it begins with b'PK"),
        (
            "idx",
            lambda data: data[:9] + b"\2" + data[10:],
            r"x.idx: has version 2 and dtype code 8; known are version 1",
        ),
        ("idx", lambda data: data[:17] + b"\x09" + data[18:], r"x.idx: has version 1 and dtype code 9"),
        ("idx", lambda data: data[:50] + b"\1" + data[51:], r"x.idx: has sizes and offsets that contradict each other"),
        (
            "idx",
            lambda data: data[:34] + struct.pack("<ii", -1, 4) + data[42:],
            r"x.idx: has sizes and offsets that contradict each other",
        ),
    ],
)
def test_damage_is_named_with_its_fix(tmp_path: Path, suffix: str, change: Any, message: str) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    damage(prefix, suffix, change)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "tools/preprocess_data.py" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "corpus_text_document.bin",
            r"is one file of a pair. Write the path without its suffix: .*corpus_text_document$",
        ),
        ("corpus_text_document.idx", r"is one file of a pair"),
        ("corpus", r"there is no corpus.bin and no corpus.idx. Did you mean .*corpus_text_document\?"),
        ("corpus_txt_document", r"Did you mean .*corpus_text_document\?"),
        ("zzz", r"The folder holds corpus_text_document"),
        ("nowhere/zzz", r"The folder .*nowhere does not exist"),
    ],
)
def test_missing_files_suggest_what_is_there(tmp_path: Path, asked: str, message: str) -> None:
    write(tmp_path / "corpus_text_document", DOCUMENTS)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / asked)


def test_one_missing_file_of_two(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"x.bin: does not exist, though x.idx does"):
        IndexedDataset(prefix)


def write_and_fail(prefix: Path) -> None:
    with contextlib.suppress(RuntimeError), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2])
        raise RuntimeError


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2])
        assert {path.name.split(".tmp")[0] for path in tmp_path.iterdir()} == {"x.bin"}
        assert not (tmp_path / "x.bin").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"x.bin", "x.idx"}


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    write_and_fail(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_old_files(tmp_path: Path) -> None:
    before = both_files(write(tmp_path / "x", DOCUMENTS))
    write_and_fail(tmp_path / "x")
    assert both_files(tmp_path / "x") == before


def test_a_full_disk_is_an_error_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(indexed, "_write_all", full)
    with (
        pytest.raises(DataError, match=r"x.bin: could not be written: No space left on device. Free some space"),
        IndexedWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add_document([1])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/x.bin: could not be written: (Not a directory|File exists)"):
        IndexedWriter(tmp_path / "file" / "x", np.uint16)


@pytest.mark.parametrize("token", [65536, -1])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, token: int) -> None:
    with (
        pytest.raises(DataError, match=rf"token id {token}: does not fit the dtype uint16 \(0 to 65535\)"),
        IndexedWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add_document([1, token])


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        process = os.fork()
        if process == 0:
            os._exit(0)
        os.waitpid(process, 0)
        gone = [tmp_path / f"a.{kind}.tmp-{process}" for kind in ("bin", "idx")]
        others = [tmp_path / f"a.bin.tmp-{os.getppid()}", tmp_path / f"ab.bin.tmp-{process}", tmp_path / "a.bin.tmp-x"]
        for path in gone + others:
            path.touch()
        writer.add_document([1, 2])
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2])
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in others)
