"""The data tools as commands: options, messages, exit codes, and a corpus from text to token files."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron.data.bar import Bar
from megatron.data.indexed import IndexedDataset
from megatron.tokenizer.build import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "megatron" / "data"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preprocess_data, train_tokenizer, prepare_stdlib = map(tool, ("preprocess_data", "train_tokenizer", "prepare_stdlib"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "new" / "tokenizer.json"
    assert train_tokenizer.main(["--input", str(SOURCES), "--suffix", ".py", "--output", str(path), "-v", "600"]) == 0
    return path


def test_a_trained_tokenizer_gives_source_code_back(trained: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(trained))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (600, 0, 1)
    for path in SOURCES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [path.name for path in trained.parent.iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic_and_says_what_it_found(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.json"
    assert train_tokenizer.main(["--input", str(SOURCES), "--suffix", ".py", "--output", str(again), "-v", "600"]) == 0
    assert again.read_bytes() == trained.read_bytes()
    printed = capsys.readouterr().out
    assert f"{again}: 600 entries, " in printed
    assert "bytes per token; 16 of 16 sample texts come back unchanged." in printed
    assert f"In the YAML: tokenizer_type: HFTokenizer, vocab_file: {again}" in printed


def test_options_of_the_neox_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "ﬁne words, fine words"}\nbad\n' * 3)
    arguments = ["--json_input_dir", str(tmp_path / "in"), "--tokenizer_output_path", str(tmp_path / "t.json")]
    assert (
        train_tokenizer.main([*arguments, "--tokenizer_type", "bpe", "--vocab_size", "300", "--nfkc", "--prefix-space"])
        == 0
    )
    printed = capsys.readouterr()
    assert "3 bad lines were left out; the first:" in printed.err
    assert "300 were wanted; no further pair occurs 2 times in the corpus." in printed.out
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert backend.decode(backend.encode("ﬁne").ids) == " fine"
    assert [backend.id_to_token(number) for number in (0, 1)] == ["<|endoftext|>", "<|padding|>"]


def test_training_on_a_part_reads_about_so_much(tmp_path: Path) -> None:
    from megatron.data.corpus import find_inputs

    (tmp_path / "a.jsonl").write_bytes(b'"0123456789"\n' * 800_000)
    files = find_inputs([str(tmp_path / "a.jsonl")])
    found = list(train_tokenizer.selected(files, 3e6))
    assert 2e6 <= sum(chunk.size for chunk in found) <= 4e6
    assert found[-1].start > 5e6
    assert sum(chunk.size for chunk in train_tokenizer.selected(files, None)) == files[0].size


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-v", "200"], "--vocab-size 200: has no room for the 256 bytes and 2 special tokens. Use at least 258"),
        (["--jsonl-keys", "body"], "holds no text (.*a.jsonl: has no key 'body'; its keys are 'text'). Check the file"),
        (["--output", "a.jsonl/t.json"], "a.jsonl/t.json: could not be written"),
    ],
)
def test_mistakes_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "words"}\n')
    assert train_tokenizer.main(["--input", "a.jsonl", "--output", "t.json", *extra]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") or "\nerror: " in printed
    assert all(part in printed for part in message.replace("(.*", "(|").split("|"))
    assert not Path("t.json").exists()


def test_preprocessing_as_a_command(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\nbad\n')
    (tmp_path / "b.txt").write_text("a text file")
    command = [
        *(sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", "a.jsonl,b.txt", "--workers", "2"),
        *("--tokenizer-type", "hftokenizer", "--vocab-file", str(trained), "--append-eod", "--output-prefix", "out/c"),
        *("--max-bad-lines", "0.5", "--num-docs", "2", "--log-interval", "1", "--dataset-impl", "mmap"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Encoding with gigatoken, checked against HFTokenizer on " in done.stdout
    assert "Vocabulary: 600 entries. Documents end with '<|endoftext|>', id 0. Workers: 2." in done.stdout
    assert "out/c_text_document.bin: 2 documents, " in done.stdout
    assert "Left out: 0 empty documents, 1 bad lines. In the YAML: data_path: out/c_text_document" in done.stdout
    assert "bad line: a.jsonl:2: is not JSON" in done.stderr
    tokenizer = load_tokenizer("HFTokenizer", str(trained))
    dataset = IndexedDataset(tmp_path / "out" / "c_text_document")
    assert [item.tolist() for item in dataset] == [[*tokenizer.encode(t), 0] for t in ("some text", "a text file")]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--dataset-impl", "cached"],
            "--dataset-impl cached: is a format that training cannot read. Leave the option out",
        ),
        (["--workers", "0"], "--workers 0: is not a number from 1 on. Write --workers 1, or leave it out."),
        (["--max-bad-lines", "5"], "--max-bad-lines 5.0: is not a share from 0 to 1."),
        (["--jsonl-keys", "a", "a"], "--jsonl-keys a a: names a key twice, and each key has its own output."),
        (["--tokenizer-type", "Bert"], "tokenizer_type = Bert: is not a known kind. Choose one of GPT2BPETokenizer"),
        (["--input", "absent.jsonl"], "--input absent.jsonl: there is no such file or folder."),
    ],
)
def test_mistakes_in_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('"text"\n')
    arguments = ["--input", "a.jsonl", "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", "o", *extra]
    assert preprocess_data.main(arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'"{"text of a document " * 10}"\n' * 1_000_000)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", "a.jsonl", "--workers", "2"]
    command += ["--tokenizer-type", "CharLevelTokenizer", "--output-prefix", "o"]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A shell lets what it starts in the background ignore SIGINT, this test itself perhaps.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as running:
        while not any(path.stat().st_size for path in tmp_path.glob("o*")):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors.endswith("stopped; no file was left behind\n")
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_all_mistakes_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "a", "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", "o", "--workers", "-1"]
    assert preprocess_data.main([*arguments, "--log-interval", "0"]) == 2
    printed = capsys.readouterr().err
    assert "--workers -1" in printed
    assert "--log-interval 0" in printed


def test_bad_lines_beyond_the_first_are_only_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('"text"\nbad\n' * 30)
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer-type", "CharLevelTokenizer"]
    assert preprocess_data.main([*arguments, "--output-prefix", str(tmp_path / "o"), "--max-bad-lines", "1"]) == 0
    printed = capsys.readouterr().err
    assert printed.count("is not JSON") == preprocess_data.SHOWN_BAD_LINES
    assert "bad line: further ones are counted, not shown" in printed


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a standard library: 120 sources, and what must be left out."""
    folder = tmp_path_factory.mktemp("lib")
    for number in range(120):
        (folder / f"m{number:03d}.py").write_text(f"import os\n\ndef f{number}(x):\n    return x + {number}\n")
    for left_out in ("test/t.py", "site-packages/p.py", "a/tests/t.py", "idlelib/idle_test/t.py", "m.txt"):
        (folder / left_out).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_out).write_text("left = 'out'\n")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "empty.py").touch()
    return folder


def test_the_quickstart_corpus(library: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data"
    arguments = ["--folder", str(library), "--output", str(output), "--vocab-size", "280"]
    assert prepare_stdlib.main(arguments) == 0
    first = capfd.readouterr().out
    assert "train the tokenizer: " in first
    corpus = json.loads((output / "corpus.json").read_text())
    dataset = IndexedDataset(output / "python_text_document")
    tokens = np.concatenate([dataset[index] for index in range(len(dataset))]).tolist()
    counts = Counter(tokens)
    entropy = -sum(count / len(tokens) * math.log(count / len(tokens)) for count in counts.values())
    assert corpus["unigram_entropy_nats"] == pytest.approx(entropy, abs=1e-9)
    assert (corpus["documents"], corpus["tokens"], corpus["vocab_size"]) == (120, len(tokens), 280)
    assert f"Unigram entropy: {entropy:.3f} nats per token" in first
    tokenizer = load_tokenizer("HFTokenizer", str(output / "tokenizer.json"))
    assert tokenizer.decode(dataset[7][:-1].tolist()) == (library / "m007.py").read_text()
    assert all(int(item[-1]) == tokenizer.eod for item in dataset)
    made = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}

    assert prepare_stdlib.main(arguments) == 0
    assert f"{output} is there and current." in capfd.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == made

    (output / "python_text_document.bin").write_bytes(b"")
    assert prepare_stdlib.main(arguments) == 0
    assert "train the tokenizer: " in capfd.readouterr().out
    assert json.loads((output / "corpus.json").read_text())["tokens"] == len(tokens)


def test_a_python_without_sources_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_stdlib.main(["--folder", str(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert "holds 0 source files; this Python comes without its standard library's sources" in capsys.readouterr().err


def test_the_bar_writes_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar("encoding", 10_000_000)
    bar.advance(1_000_000, "12 documents")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bar, "last_line", bar.last_line - 60)
    monkeypatch.setattr(bar, "start", bar.start - 1000)
    bar.advance(4_000_000)
    bar.close()
    assert capsys.readouterr().err == "encoding: 50%, 0.0 MB/s, 17 min left, 12 documents\n"
