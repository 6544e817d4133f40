"""The quickstart's data: Python's own standard library, as every machine with Python has it.

    tools/prepare_stdlib.py

collects the sources (with the language reference in pydoc_data), trains a tokenizer on them, encodes them, and writes
to data/quickstart/: stdlib.jsonl, tokenizer.json, python_text_document.{bin,idx,json} and corpus.json with what it
found, the unigram entropy of the tokens among it. What is already there and current is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.errors import DataError, DeepyError, Problem

ROOT = Path(__file__).resolve().parents[1]

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
"""Folders that are not the library itself, or that repeat it."""


def library_files(folder: Path) -> list[Path]:
    """The Python sources of the standard library in `folder`, sorted."""
    inside = (path.relative_to(folder) for path in folder.rglob("*.py"))
    files = sorted(path for path in inside if not LEFT_OUT & set(path.parts))
    if len(files) < 100:
        raise DataError(
            Problem(
                what=str(folder),
                why=f"holds {len(files)} source files; this Python comes without its standard library's sources.",
                fix="Run with another Python: python3 -m venv, or --folder with any folder of .py files.",
            )
        )
    return files


def collect(folder: Path, output: Path) -> int:
    """Write one JSON line per source file, sorted by path, and return the bytes of text."""
    num_bytes = 0
    temporary = output.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for path in library_files(folder):
            try:
                text = (folder / path).read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few encoding examples are not UTF-8 on purpose
                continue
            if text:
                file.write(json.dumps({"text": text, "path": path.as_posix()}) + "\n")
                num_bytes += len(text.encode())
    os.replace(temporary, output)
    return num_bytes


def unigram_entropy(tokens: np.ndarray[Any, Any]) -> float:
    """Nats per token of single tokens: the loss of a model that knows only how often each occurs."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / tokens.size
    return float(-(shares * np.log(shares)).sum())


def state_of(folder: Path, vocab_size: int) -> str:
    """A hash that changes when the library's files, this tool's parameters or the Python version change."""
    digest = hashlib.sha256(f"{sys.version} {vocab_size} {sorted(LEFT_OUT)}\n".encode())
    for path in library_files(folder):
        status = (folder / path).stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def is_current(output: Path, state: str) -> bool:
    """Whether corpus.json is of this state and every file it speaks of is there and readable."""
    try:
        corpus = json.loads((output / "corpus.json").read_text())
        dataset = IndexedDataset(output / "python_text_document")
    except (OSError, ValueError, DataError):
        return False
    known = corpus.get("state") == state and corpus.get("tokens") == dataset.num_tokens
    return bool(known and (output / "tokenizer.json").is_file())


def tool(name: str, *arguments: str) -> None:
    """Run one of the tools beside this one, as a user would, and stop with its exit code if it fails."""
    print(f"  python tools/{name} {' '.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, str(ROOT / "tools" / name), *arguments], check=False).returncode
    if status != 0:
        raise SystemExit(status)


def describe(output: Path, num_bytes: int, state: str, seconds: dict[str, float]) -> dict[str, Any]:
    """What was made, as it stands in corpus.json."""
    dataset = IndexedDataset(output / "python_text_document")
    sidecar = json.loads((output / "python_text_document.json").read_text())
    entropy = unigram_entropy(np.fromfile(output / "python_text_document.bin", dataset.dtype))
    return {
        "unigram_entropy_nats": entropy,
        "documents": len(dataset),
        "tokens": dataset.num_tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / dataset.num_tokens,
        "vocab_size": sidecar["vocab_size"],
        "tokenizer_sha256": sidecar["tokenizer_sha256"],
        "python": sys.version.split()[0],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "state": state,
    }


def prepare(folder: Path, output: Path, vocab_size: int) -> dict[str, Any]:
    """Collect, train, encode, describe; each stage says how long it took."""
    output.mkdir(parents=True, exist_ok=True)
    texts, tokenizer = output / "stdlib.jsonl", output / "tokenizer.json"
    seconds: dict[str, float] = {}

    def stage(title: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[title] = time.perf_counter() - start
        print(f"{title}: {seconds[title]:.1f} s", flush=True)
        return result

    state = state_of(folder, vocab_size)
    (output / "corpus.json").unlink(missing_ok=True)
    num_bytes = stage("collect the sources", lambda: collect(folder, texts))
    stage(
        "train the tokenizer",
        lambda: tool(
            "train_tokenizer.py",
            *("--input", str(texts), "--output", str(tokenizer), "--vocab-size", str(vocab_size)),
        ),
    )
    stage(
        "encode",
        lambda: tool(
            "preprocess_data.py",
            *("--input", str(texts), "--tokenizer-type", "HFTokenizer", "--vocab-file", str(tokenizer)),
            *("--append-eod", "--output-prefix", str(output / "python")),
        ),
    )
    corpus = describe(output, num_bytes, state, seconds)
    temporary = output / "corpus.tmp"
    temporary.write_text(json.dumps(corpus, indent=1) + "\n")
    os.replace(temporary, output / "corpus.json")
    return corpus


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the quickstart's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stdlib = sysconfig.get_paths()["stdlib"]
    parser.add_argument("--folder", type=Path, default=Path(stdlib), help="folder of .py files (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/quickstart"), help="folder to write (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="entries of the tokenizer (%(default)s)")
    parser.add_argument("--force", action="store_true", help="make everything again")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is printed without a traceback."""
    parsed = parse_arguments(arguments)
    try:
        if not parsed.force and is_current(parsed.output, state_of(parsed.folder, parsed.vocab_size)):
            print(f"{parsed.output} is there and current.")
            corpus = json.loads((parsed.output / "corpus.json").read_text())
        else:
            corpus = prepare(parsed.folder, parsed.output, parsed.vocab_size)
    except DeepyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    entropy = corpus["unigram_entropy_nats"]
    print(
        f"{corpus['documents']:,} documents, {corpus['bytes'] / 1e6:.1f} MB, {corpus['tokens']:,} tokens "
        f"({corpus['bytes_per_token']:.2f} bytes each) of {corpus['vocab_size']:,} kinds.\n"
        f"Unigram entropy: {entropy:.3f} nats per token (perplexity {math.exp(entropy):,.0f}); "
        f"a model that knows nothing has {math.log(corpus['vocab_size']):.3f}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
