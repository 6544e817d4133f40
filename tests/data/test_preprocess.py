"""Preprocessing against bytes built here by hand and against GPT-NeoX's own, for every input format and mistake."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron.data.chunks import chunks
from megatron.data.corpus import find_inputs
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import Counts, Job, encoder_for, preprocess
from megatron.data.reading import read_documents, sample_texts
from megatron.errors import DataError
from megatron.tokenizer.build import load_tokenizer
from tests.tokenizer import small


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_ranks(tmp_path_factory.mktemp("ranks"))


DOCUMENTS = ["Hello.\n", "", "naïve café\n\n日本語", "x", "", "a\tb  c", "😀" * 5, '"quoted" \\ \u2028 end']


def job_for(inputs: list[Path | str], prefix: Path, **settings: Any) -> Job:
    files = find_inputs([str(path) for path in inputs], settings.pop("suffixes", ()))
    tokenizer = settings.pop("tokenizer", None) or load_tokenizer("CharLevelTokenizer")
    keys = settings.pop("keys", ("text",))
    return Job(files, str(prefix), encoder_for(tokenizer, files, keys), keys, **settings)


def run(job: Job) -> tuple[dict[str, Counts], list[str]]:
    reported: list[str] = []
    seen: list[int] = []
    counts = preprocess(job, lambda num_bytes, _: seen.append(num_bytes), reported.append)
    assert sum(seen) == sum(source.size for source in job.files)
    return counts, reported


def lines(documents: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"meta": {"n": 1}, key: text}).encode() + b"\n" for text in documents)


def outputs(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_{key}_document.{suffix}").read_bytes() for suffix in ("bin", "idx"))  # type: ignore[return-value]


def by_hand(documents: list[str], end: int | None) -> tuple[bytes, bytes]:
    """GPT-NeoX's two files for the character-level tokenizer, with struct alone: empty documents leave no trace."""
    items = [list(text.encode()) + ([] if end is None else [end]) for text in documents if text]
    sizes = [len(item) for item in items]
    index = (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(items), len(items) + 1) + struct.pack(f"<{len(sizes)}i", *sizes)
    )
    index += struct.pack(f"<{len(sizes)}q", *[2 * sum(sizes[:i]) for i in range(len(sizes))])
    return b"".join(struct.pack("<H", token) for item in items for token in item), index + struct.pack(
        f"<{len(items) + 1}q", *range(len(items) + 1)
    )


WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "c.jsonl": bytes,
    "c.jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data[:50]) + zstandard.compress(data[50:]),
    "c.jsonl.gz": gzip.compress,
}


@pytest.mark.parametrize("end", [None, 0])
@pytest.mark.parametrize("name", WRITERS)
def test_bytes_are_those_of_gpt_neox(tmp_path: Path, name: str, end: int | None) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](lines(DOCUMENTS)))
    counts, reported = run(job_for([tmp_path / name], tmp_path / "out", append_eod=end is not None))
    assert outputs(tmp_path / "out") == by_hand(DOCUMENTS, end)
    assert reported == []
    assert (counts["text"].num_documents, counts["text"].num_empty, counts["text"].num_lines) == (6, 2, 8)
    assert counts["text"].num_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_data_of_the_recorded_runs_comes_out_the_same(golden: Path, tmp_path: Path) -> None:
    folder = golden / "train" / "data"
    tokenizer = load_tokenizer("HFTokenizer", str(folder / "tokenizer_small.json"))
    recorded = IndexedDataset(folder / "small_text_document")
    ends = {int(item[-1]) for item in recorded}
    assert ends == {tokenizer.eod}
    (tmp_path / "c.jsonl").write_bytes(lines([tokenizer.decode(item[:-1].tolist()) for item in recorded]))
    run(job_for([tmp_path / "c.jsonl"], tmp_path / "out", tokenizer=tokenizer, append_eod=True, workers=2))
    expected = tuple((folder / f"small_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx"))
    assert outputs(tmp_path / "out") == expected


def test_workers_and_chunks_do_not_change_the_output(
    tmp_path: Path, bpe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(5)
    texts = ["".join(draw.choices("abc é日\n ", k=draw.choice([0, 1, 30, 3000]))) for _ in range(300)]
    (tmp_path / "a.jsonl").write_bytes(lines(texts).rstrip(b"\n"))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines(texts)))
    (tmp_path / "c.txt").write_text("one text file\n")
    inputs: list[Path | str] = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst", tmp_path / "c.txt"]
    found = []
    for workers, chunk_bytes in ((1, 1 << 20), (1, 700), (2, 3000), (3, 50000)):
        monkeypatch.setattr("megatron.data.preprocess.LEAST_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr("megatron.data.preprocess.CHUNK_BYTES", chunk_bytes)
        job = job_for(
            inputs, tmp_path / f"{workers}-{chunk_bytes}", tokenizer=load_tokenizer("HFTokenizer", str(bpe_file)),
            append_eod=True, workers=workers,
        )  # fmt: skip
        assert job.encoder.fast is not None
        run(job)
        found.append(outputs(Path(job.prefix)))
    slow = replace(job, prefix=str(tmp_path / "slow"), encoder=replace(job.encoder, fast=None), workers=2)
    run(slow)
    found.append(outputs(tmp_path / "slow"))
    assert all(files == found[0] for files in found)
    assert len(IndexedDataset(tmp_path / "slow_text_document")) == 2 * sum(map(bool, texts)) + 1


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 50, 10**6])
@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_every_cut_of_a_file_gives_every_line_once(tmp_path: Path, chunk_bytes: int, ending: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'"a"\n\n"bc"\n"d"\n   \n"efgh"' + ending)
    found = [
        read_documents(chunk, ("text",)) for chunk in chunks(find_inputs([str(tmp_path / "c.jsonl")]), chunk_bytes)
    ]
    assert [text for documents in found for text in documents.texts["text"]] == ["a", "bc", "d", "efgh"]
    assert sum(documents.num_lines for documents in found) == 6


def test_each_key_gets_its_own_text(tmp_path: Path) -> None:
    rows = [{"question": "2+2?", "answer": "4"}, {"question": "why?", "answer": ""}, {"question": "", "answer": ""}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts, _ = run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", keys=("question", "answer"), append_eod=True))
    questions, answers = (IndexedDataset(tmp_path / f"o_{key}_document") for key in ("question", "answer"))
    assert [bytes(item.tolist()) for item in questions] == [b"2+2?\0", b"why?\0"]
    assert [bytes(item.tolist()) for item in answers] == [b"4\0", b"\0"]  # aligned with the questions
    assert counts["question"].num_documents == counts["answer"].num_documents == 2


def test_plain_strings_lists_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf"just text"\r\n{"text": ["one", "two"]}\r\n')
    run(job_for([tmp_path / "c.jsonl"], tmp_path / "o"))
    assert outputs(tmp_path / "o") == by_hand(["just text", "one\n\ntwo"], None)


def test_text_files_and_folders_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("deepy"), "propagate", True)
    folder = tmp_path / "in"
    for name, content in {
        "b.txt": b"second\r\nline\r",
        "a/z.txt": b"first",
        "c.py": b"third = 1\n",
        "d.dat": b"not read",
        ".hidden/x.txt": b"not read",
        "empty.txt": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    counts, _ = run(job_for([folder], tmp_path / "o", suffixes=["py"]))
    assert outputs(tmp_path / "o") == by_hand(["first", "second\nline\n", "third = 1\n"], None)
    assert (counts["text"].num_documents, counts["text"].num_empty) == (3, 1)
    assert f"{folder}: files left out, with other endings: 1 (.dat)" in caplog.messages

    job = job_for([str(folder / "*.py"), folder / "b.txt"], tmp_path / "p", suffixes=[".py"])
    assert [source.path.name for source in job.files] == ["c.py", "b.txt"]


def test_a_document_without_ids_is_kept_as_gpt_neox_keeps_it(tmp_path: Path) -> None:
    class Deaf(type(load_tokenizer("CharLevelTokenizer"))):  # type: ignore[misc]
        def encode(self, text: str) -> list[int]:
            return list(text.replace("?", "").encode())

    (tmp_path / "c.jsonl").write_bytes(lines(["a", "?", "b"]))
    job = job_for([tmp_path / "c.jsonl"], tmp_path / "o", tokenizer=Deaf())
    assert job.encoder.fast is None
    run(job)
    dataset = IndexedDataset(tmp_path / "o_text_document")
    assert (dataset.sizes.tolist(), dataset.doc_idx.tolist()) == ([1, 1], [0, 1, 1, 2])
    run(replace(job, prefix=str(tmp_path / "e"), append_eod=True))
    assert IndexedDataset(tmp_path / "e_text_document").sizes.tolist() == [2, 1, 2]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, rank_file: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(["the thing", "in 123"]))
    tokenizer = load_tokenizer("TiktokenTokenizer", str(rank_file))
    run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", tokenizer=tokenizer, append_eod=True))
    dataset = IndexedDataset(tmp_path / "o_text_document")
    assert dataset.dtype == np.dtype("<i4")
    assert [item.tolist() for item in dataset] == [[*tokenizer.encode(t), 100257] for t in ("the thing", "in 123")]


def test_sidecar(tmp_path: Path, bpe_file: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(["the text", "", "é"]) + b"oops\n")
    tokenizer = load_tokenizer("HFTokenizer", str(bpe_file))
    job = job_for([tmp_path / "c.jsonl"], tmp_path / "o", tokenizer=tokenizer, max_bad_fraction=0.5, append_eod=True)
    run(replace(job, tokenizer_files=(str(bpe_file), None)))
    assert json.loads((tmp_path / "o_text_document.json").read_text()) == {
        "documents": 2,
        "tokens": len(tokenizer.encode("the text")) + len(tokenizer.encode("é")) + 2,
        "bytes": 10,
        "empty_documents": 1,
        "bad_lines": 1,
        "dtype": "uint16",
        "append_eod": True,
        "key": "text",
        "inputs": [str(tmp_path / "c.jsonl")],
        "num_inputs": 1,
        "tokenizer_type": "HFTokenizer",
        "tokenizer_sha256": tokenizer.fingerprint(),
        "vocab_size": 900,
        "vocab_file": str(bpe_file),
        "merge_file": None,
    }


BAD = [
    (b'{"text": "unfinished', 'is not JSON (Unterminated string starting at at column 10): \'{"text": "unfinished\''),
    (b'{"content": "x", "id": 1}', "has no key 'text'; its keys are 'content', 'id'"),
    (b'{"text": 5}', "key 'text' holds int, not a string"),
    (b'{"text": null}', "key 'text' holds NoneType, not a string"),
    (b"[1, 2]", "is a JSON list, not an object"),
    (b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
    (b'{"text": "ab\\ud83d"}', "holds half of a surrogate pair at character 2"),
    (b"[" * 100000, "maximum recursion depth exceeded"),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named_and_counted(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.preprocess.LEAST_CHUNK_BYTES", 60)
    monkeypatch.setattr("megatron.data.preprocess.CHUNK_BYTES", 60)
    good = [b'{"text": "good"}\n' * 40 for _ in BAD]
    (tmp_path / "c.jsonl").write_bytes(b"".join(g + bad + b"\n" for g, (bad, _) in zip(good, BAD, strict=True)))
    job = job_for([tmp_path / "c.jsonl"], tmp_path / "o", max_bad_fraction=0.03, workers=workers)
    counts, reported = run(job)
    assert counts["text"].num_bad == len(BAD)
    assert counts["text"].num_documents == 40 * len(BAD)
    for number, (message, (_, reason)) in enumerate(zip(reported, BAD, strict=True), 1):
        assert message.startswith(f"{tmp_path / 'c.jsonl'}:{41 * number}: {reason}")


def test_too_many_bad_lines_are_fatal_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(["good"] * 90) + b"bad\n" * 10)
    job = job_for([tmp_path / "c.jsonl"], tmp_path / "o")
    message = r"10 of 100 lines: are no documents \(10.00%; allowed are 1.00%\).* --max-bad-lines 0.11"
    with pytest.raises(DataError, match=message):
        run(job)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    run(replace(job, max_bad_fraction=0.11))


def test_a_wrong_key_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.preprocess.LEAST_CHUNK_BYTES", 1000)
    monkeypatch.setattr("megatron.data.preprocess.CHUNK_BYTES", 1000)
    (tmp_path / "c.jsonl").write_bytes(lines(["text of a document"] * 5000, key="content"))
    reported: list[str] = []
    with pytest.raises(DataError, match=r"of .* lines: are no documents .* choose other --jsonl-keys"):
        preprocess(job_for([tmp_path / "c.jsonl"], tmp_path / "o"), lambda *_: None, reported.append)
    assert len(reported) < 200
    assert "has no key 'text'; its keys are 'meta', 'content'" in reported[0]


def test_text_files_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    job = job_for([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "o", max_bad_fraction=0.5)
    _, reported = run(job)
    assert reported == [f"{tmp_path / 'a.txt'}: is not UTF-8 at byte 3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b"", "holds no text: 0 lines, 0 of them empty documents. Check the files and --jsonl-keys text"),
        ("c.jsonl", b'{"text": ""}\n', "holds no text: 1 lines, 1 of them empty"),
        ("c.jsonl.zst", b"not zstd", "c.jsonl.zst: cannot be decompressed: .* It is damaged; copy it again"),
        (
            "c.jsonl.zst",
            zstandard.compress(b'"a"\n' * 99)[:-4],
            "cannot be decompressed: it ends in the middle of a frame",
        ),
        ("c.jsonl.gz", b"not gzip", "cannot be decompressed: Not a gzipped file"),
        (
            "c.jsonl.gz",
            gzip.compress(b'"a"\n' * 99, mtime=0)[:-9],
            "cannot be decompressed: Compressed file ended before",
        ),
    ],
)
def test_unusable_input(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(job_for([tmp_path / name], tmp_path / "o"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "absent.jsonl",
            r"--input absent.jsonl: there is no such file or folder. Correct the path; . holds data.csv, empty",
        ),
        ("no/where.jsonl", "the folder no does not exist either"),
        ("empty", r"--input empty: the folder holds no file ending in .jsonl .* Add --suffix"),
        ("data.csv", r"--input data.csv: has an unknown ending; known are .* add --suffix .csv"),
        ("x.tar.gz", r"--input x.tar.gz: is an archive, which is not read directly. Unpack it"),
    ],
)
def test_inputs_that_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").touch()
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(DataError, match=message):
        find_inputs([name])


def test_missing_optional_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(["a"]))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines(["a"])))
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(
        DataError, match=r"--ftfy: needs ftfy, which is not installed. pip install -r requirements/ftfy.txt"
    ):
        run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", fix_text=True))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"needs zstandard, which is not installed. pip install zstandard"):
        job_for([tmp_path / "d.jsonl.zst"], tmp_path / "o")


def test_ftfy_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ftfy:
        @staticmethod
        def fix_text(text: str) -> str:
            return text.replace("Ã©", "é")

    monkeypatch.setitem(sys.modules, "ftfy", Ftfy)  # type: ignore[arg-type]
    (tmp_path / "c.jsonl").write_bytes(lines(["cafÃ©"]))
    run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", fix_text=True))
    assert outputs(tmp_path / "o") == by_hand(["café"], None)


def test_a_killed_worker_is_an_error_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(["a", "b"]))
    monkeypatch.setattr("megatron.data.preprocess.encode_chunk", lambda *_: os._exit(9))
    with pytest.raises(
        DataError, match=r"a worker of 2: was killed, most likely because memory ran out. Use fewer --work"
    ):
        run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", workers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal at a parent's death")
def test_workers_end_with_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> None:
        (tmp_path / f"worker{os.getpid()}").touch()
        time.sleep(60)

    def state(process: int) -> str:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "gone"

    (tmp_path / "c.jsonl").write_bytes(lines(["a", "b"]))
    monkeypatch.setattr("megatron.data.preprocess.encode_chunk", endless)
    parent = os.fork()
    if parent == 0:
        run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", workers=2))
        os._exit(1)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("worker*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    [worker] = [int(path.name.removeprefix("worker")) for path in tmp_path.glob("worker*")]
    while state(worker) not in ("gone", "Z") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert state(worker) in ("gone", "Z")


def test_an_old_sidecar_never_describes_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(["a", "b"]))
    run(job_for([tmp_path / "c.jsonl"], tmp_path / "o"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.data.preprocess.write_sidecar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job_for([tmp_path / "c.jsonl"], tmp_path / "o", append_eod=True))
    assert not (tmp_path / "o_text_document.json").exists()


def test_the_sample_comes_from_all_over_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([f"{number:05d} {'x' * 200}" for number in range(1000)]))
    for number in range(40):
        (tmp_path / f"t{number:02d}.txt").write_text(f"file {number}")
    many = sample_texts(find_inputs([str(tmp_path / "a.jsonl")]), ("text",))
    numbers = [int(text[:5]) for text in many]
    assert len(numbers) == 16
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] > 900
    files = sample_texts(find_inputs([str(tmp_path / "t*.txt")]), ("text",))
    assert len(files) == 16
    assert files[-1] in {f"file {number}" for number in range(36, 40)}
