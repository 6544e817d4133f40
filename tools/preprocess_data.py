"""Text to token files for training.

    tools/preprocess_data.py --input corpus.jsonl --tokenizer-type HFTokenizer --vocab-file tokenizer.json \\
        --append-eod --output-prefix data/corpus

writes data/corpus_text_document.bin, .idx and .json; in the YAML: `data_path: data/corpus_text_document`. The options
are those of GPT-NeoX. Input: .jsonl, .jsonl.zst, .jsonl.gz, .txt, or folders of them; --suffix adds endings of text
files.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.bar import Bar
from megatron.data.corpus import find_inputs
from megatron.data.indexed import bin_path
from megatron.data.preprocess import Counts, Job, encoder_for, preprocess
from megatron.errors import ConfigError, DeepyError, Problem
from megatron.tokenizer.build import LOADERS, load_tokenizer

SHOWN_BAD_LINES = 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; defaults as in GPT-NeoX except for --workers, which is the number of cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns, also comma-separated")
    add("--suffix", nargs="+", default=[], metavar=".EXT", help="further endings of text files, one document per file")
    add("--jsonl-keys", nargs="+", default=["text"], metavar="KEY", help="keys to encode, each to its own output")
    add("--num-docs", type=int, help="number of documents, if known: the progress bar counts them instead of bytes")
    add("--tokenizer-type", required=True, metavar="TYPE", help=", ".join(LOADERS))
    add("--vocab-file", help="vocabulary or tokenizer file, or the name of an encoding")
    add("--merge-file", help="merges file of GPT2BPETokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--ftfy", action="store_true", help="mend broken Unicode with ftfy first")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_<key>_document.bin, .idx and .json")
    add("--dataset-impl", default="mmap", choices=["mmap", "lazy", "cached"], help="mmap is the only format")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s, the cores)")
    add("--log-interval", type=int, default=100, metavar="N", help="documents between updates of the progress bar")
    add(
        "--max-bad-lines",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of bad lines that is allowed (%(default)s)",
    )
    parsed = parser.parse_args(arguments)
    _check(parsed)
    return parsed


def _check(parsed: argparse.Namespace) -> None:
    """Refuse what cannot work, all of it at once."""
    problems = []
    if parsed.dataset_impl != "mmap":
        what = f"--dataset-impl {parsed.dataset_impl}"
        problems.append(Problem(what, "is a format that training cannot read.", "Leave the option out, or write mmap."))
    for name, value, fits in (
        ("--workers", parsed.workers, parsed.workers >= 1),
        ("--log-interval", parsed.log_interval, parsed.log_interval >= 1),
        ("--max-bad-lines", parsed.max_bad_lines, 0 <= parsed.max_bad_lines <= 1),
    ):
        if not fits:
            wanted = "a share from 0 to 1" if name == "--max-bad-lines" else "a number from 1 on"
            problems.append(Problem(f"{name} {value}", f"is not {wanted}.", f"Write {name} 1, or leave it out."))
    if len(set(parsed.jsonl_keys)) != len(parsed.jsonl_keys):
        what = f"--jsonl-keys {' '.join(parsed.jsonl_keys)}"
        problems.append(Problem(what, "names a key twice, and each key has its own output.", "Name each key once."))
    if problems:
        raise ConfigError(*problems)


class Display:
    """The progress bar over documents, if their number is known, or bytes of input, and bad lines printed above it."""

    def __init__(self, num_bytes: int, num_documents: int | None, interval: int) -> None:
        self.by_documents = num_documents is not None
        self.interval = interval
        self.pending = self.shown_documents = self.num_bad = 0
        self.bar = Bar("encoding", num_documents or num_bytes, "documents" if self.by_documents else "MB")

    def progress(self, num_bytes: int, counts: Counts) -> None:
        """Move on by a chunk, if `interval` documents have passed since the last time."""
        self.pending += num_bytes
        new = counts.num_documents - self.shown_documents
        if new >= self.interval:
            note = f"{counts.num_documents:,} documents, {counts.num_tokens / 1e6:,.1f} M tokens"
            self.bar.advance(new if self.by_documents else self.pending, note)
            self.pending, self.shown_documents = 0, counts.num_documents

    def report(self, message: str) -> None:
        """Show a bad line; after SHOWN_BAD_LINES they are only counted."""
        self.num_bad += 1
        if self.num_bad <= SHOWN_BAD_LINES:
            self.bar.message(f"bad line: {message}")
        elif self.num_bad == SHOWN_BAD_LINES + 1:
            self.bar.message("bad line: further ones are counted, not shown")

    def close(self) -> None:
        """Complete the bar and give the terminal back."""
        self.bar.advance(0 if self.by_documents else self.pending)
        self.bar.close()


def run(parsed: argparse.Namespace) -> None:
    """Find the input, load the tokenizer, encode, and say what came of it."""
    start = time.perf_counter()
    files = find_inputs([name for group in parsed.input for name in group.split(",") if name], parsed.suffix)
    tokenizer = load_tokenizer(parsed.tokenizer_type, parsed.vocab_file, parsed.merge_file)
    keys = tuple(parsed.jsonl_keys)
    encoder = encoder_for(tokenizer, files, keys)
    end = f" Documents end with {tokenizer.decode([tokenizer.eod])!r}, id {tokenizer.eod}." if parsed.append_eod else ""
    print(
        f"{encoder.reason}\nVocabulary: {tokenizer.vocab_size:,} entries.{end} Workers: {parsed.workers}.", flush=True
    )
    job = Job(
        files=files,
        prefix=parsed.output_prefix,
        encoder=encoder,
        keys=keys,
        append_eod=parsed.append_eod,
        fix_text=parsed.ftfy,
        workers=parsed.workers,
        max_bad_fraction=parsed.max_bad_lines,
        tokenizer_files=(parsed.vocab_file, parsed.merge_file),
    )
    display = Display(sum(source.size for source in files), parsed.num_docs, parsed.log_interval)
    try:
        counts = preprocess(job, display.progress, display.report)
    finally:
        display.close()
    for key in keys:
        print(summary(job, key, counts[key], time.perf_counter() - start))


def summary(job: Job, key: str, counts: Counts, seconds: float) -> str:
    """What was written for `key`, and how to use it."""
    left_out = f" Left out: {counts.num_empty:,} empty documents, {counts.num_bad:,} bad lines."
    return (
        f"{bin_path(job.output(key))}: {counts.num_documents:,} documents, {counts.num_tokens:,} tokens ({job.dtype}), "
        f"{counts.num_bytes / max(1, counts.num_tokens):.2f} bytes per token, {counts.num_bytes / 1e6:,.1f} MB "
        f"of text in {seconds:.1f} s ({counts.num_bytes / 1e6 / seconds:.1f} MB/s)."
        f"{left_out if counts.num_empty or counts.num_bad else ''} In the YAML: data_path: {job.output(key)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is printed without a traceback."""
    try:
        run(parse_arguments(arguments))
    except DeepyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; no file was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
