"""From text to batches: preprocessing beside `tokenizers.encode_batch`, then index and sample rate of the data set.

    python benchmarks/data.py [--quick] [--json FILE] [--enforce]

Preprocessing: the whole command `tools/preprocess_data.py`, from the start of Python to the synced files, over the
sources of the standard library and of the installed packages, each different file once, since repeated text would
flatter a tokenizer that remembers words. `encode_batch` gets documents from all over the same corpus, already in
memory, and all cores; reading, JSON and writing are not in its time. The two alternate in one run, and their ids are
compared first. "steady" leaves out the start of the command, as measured with an input of one line.
The second half is benchmarks/dataset_index.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.indexed import IndexedDataset
from megatron.tokenizer.hf import load_hf
from megatron.tokenizer.train import train_byte_level_bpe

ROOT = Path(__file__).resolve().parents[1]
AIM = 25.0
"""Least factor of the whole command over encode_batch."""


def distinct_sources(folders: list[Path], num_bytes: int) -> Iterator[str]:
    """The texts of the Python files in `folders`, in the order of their paths, each content once, up to `num_bytes`."""
    seen: set[int] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text and hash(text) not in seen:
                seen.add(hash(text))
                num_bytes -= len(text)
                yield text
            if num_bytes <= 0:
                return


def prepare(folder: Path, num_bytes: int, vocab_size: int) -> list[str]:
    """Write corpus.jsonl, line.jsonl and tokenizer.json, and return the documents."""
    paths = sysconfig.get_paths()
    documents = list(distinct_sources([Path(paths["stdlib"]), Path(paths["purelib"])], num_bytes))
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "line.jsonl").write_text('{"text": "one line"}\n')
    train_byte_level_bpe(documents[:: max(1, len(documents) // 500)], vocab_size).save(str(folder / "tokenizer.json"))
    return documents


def command_seconds(folder: Path, name: str) -> float:
    """Wall seconds of the preprocessing command over `name`.jsonl."""
    command = [
        *(sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(folder / f"{name}.jsonl")),
        *("--tokenizer-type", "HFTokenizer", "--vocab-file", str(folder / "tokenizer.json"), "--append-eod"),
        *("--output-prefix", str(folder / name)),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    if "Encoding with gigatoken" not in done.stdout:
        print(done.stdout.splitlines()[0])
    return seconds


def same_ids(folder: Path, documents: list[str], every: int) -> None:
    """Stop unless the command stored the ids that `encode_batch` gives, for the documents that it will be timed on."""
    stored = IndexedDataset(folder / "corpus_text_document")
    tokenizer = load_hf(str(folder / "tokenizer.json"))
    assert len(stored) == len(documents)
    encodings = tokenizer.backend.encode_batch(documents[::every])
    for index, encoding in zip(range(0, len(documents), every), encodings, strict=True):
        assert stored[index].tolist() == [*encoding.ids, tokenizer.eod], f"document {index} differs"


def measure_preprocessing(quick: bool) -> dict[str, Any]:
    """Rates in MB of text per second of wall time (medians), the factor (median over rounds), and every round."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # encode_batch on all cores
    with tempfile.TemporaryDirectory(prefix="preprocessing") as name:
        folder = Path(name)
        documents = prepare(folder, (120 if quick else 1000) * 10**6, 8192 if quick else 50257)
        megabytes = sum(len(text.encode()) for text in documents) / 1e6
        command_seconds(folder, "corpus")  # warms the page cache for both
        every = max(1, round(megabytes / (2 if quick else 8)))
        same_ids(folder, documents, every)
        part = documents[::every]
        part_megabytes = sum(len(text.encode()) for text in part) / 1e6
        backend = load_hf(str(folder / "tokenizer.json")).backend
        rounds = []
        for _ in range(3 if quick else 7):
            start = time.perf_counter()
            backend.encode_batch(part)
            baseline = part_megabytes / (time.perf_counter() - start)
            seconds, start_seconds = command_seconds(folder, "corpus"), command_seconds(folder, "line")
            rounds.append((baseline, megabytes / seconds, megabytes / (seconds - start_seconds), start_seconds))
    baseline, whole, steady, start_seconds = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "corpus_mb": megabytes,
        "documents": len(documents),
        "encode_batch_mb_per_second": baseline,
        "command_mb_per_second": whole,
        "steady_mb_per_second": steady,
        "command_start_seconds": start_seconds,
        "preprocessing_speedup": statistics.median(row[1] / row[0] for row in rounds),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": [[round(value, 2) for value in row] for row in rounds],
    }


def run_dataset_index(quick: bool, enforce: bool) -> tuple[dict[str, Any], int]:
    """Run the second half in a process of its own; its figures and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        options = [*(["--quick"] if quick else []), *(["--enforce"] if enforce else []), "--json", str(output)]
        command = [sys.executable, str(ROOT / "benchmarks" / "dataset_index.py"), *options]
        status = subprocess.run(command, check=False).returncode
        if not output.exists():
            raise SystemExit(status or 1)
        return json.loads(output.read_text()), status


def main() -> int:
    """Measure, print, and judge if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller corpus and fewer rounds; under 50 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--enforce", action="store_true", help="exit 1 where an aim is missed")
    parser.add_argument("--only", choices=["preprocessing", "dataset"], help="one half alone")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    status = 0
    if options.only != "dataset":
        results = measure_preprocessing(options.quick)
        for name, value in results.items():
            print(f"{name:34} {value:>18,.2f}" if isinstance(value, float) else f"{name:34} {value!s:>18}")
        if results["preprocessing_speedup"] < AIM:
            print(f"missed: preprocessing_speedup is {results['preprocessing_speedup']:.1f}, the aim {AIM}")
            status = 1 if options.enforce else 0
    if options.only != "preprocessing":
        figures, index_status = run_dataset_index(options.quick, options.enforce)
        results |= {"dataset_index": figures} if results else figures
        status = status or index_status
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
