"""Train a byte-level BPE tokenizer.

    tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.json --vocab-size 32000

writes a tokenizer.json for `tokenizer_type: HFTokenizer`. Input as for preprocess_data.py. Text comes back from it
unchanged, unless --nfkc or --prefix-space is given, which GPT-NeoX's trainer always applies.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers

from megatron.data.bar import Bar
from megatron.data.chunks import Chunk, chunks
from megatron.data.corpus import InputFile, find_inputs, input_error
from megatron.data.reading import read_documents, sample_texts
from megatron.errors import DeepyError, Problem, TokenizerError
from megatron.tokenizer.special import END_OF_DOCUMENT, PADDING
from megatron.tokenizer.train import train_byte_level_bpe

CHUNK_BYTES = 1 << 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the options of GPT-NeoX's trainer are understood too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", "--json_input_dir", nargs="+", required=True, metavar="PATH", help="files, folders or patterns")
    add("--output", "--tokenizer_output_path", required=True, metavar="FILE", help="the tokenizer.json to write")
    add(
        "-v",
        "--vocab-size",
        "--vocab_size",
        type=int,
        default=52000,
        help="entries, special tokens included (%(default)s)",
    )
    add("--tokenizer_type", type=str.upper, default="BPE", choices=["BPE"], help="byte-level BPE is the only type")
    add("--jsonl-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the JSON objects to read")
    add("--suffix", nargs="+", default=[], metavar=".EXT", help="further endings of text files")
    add(
        "--special-tokens",
        nargs="+",
        default=[END_OF_DOCUMENT, PADDING],
        metavar="TOKEN",
        help="the first ids, in order",
    )
    add("--min-frequency", type=int, default=2, help="pairs seen less often are not merged (%(default)s)")
    add("--max-mb", type=float, metavar="MB", help="train on about so much input, taken evenly from all of it")
    add("--nfkc", action="store_true", help="normalise text to NFKC (loses information)")
    add("--prefix-space", action="store_true", help="put a space before every text (loses information)")
    return parser.parse_args(arguments)


def selected(files: Sequence[InputFile], max_bytes: float | None) -> Iterator[Chunk]:
    """The chunks to train on: all, or evenly spaced ones of about `max_bytes` together."""
    share = 1.0 if max_bytes is None else min(1.0, max_bytes / max(1, sum(source.size for source in files)))
    for index, chunk in enumerate(chunks(files, CHUNK_BYTES)):
        if int((index + 1) * share) > int(index * share) or (index == 0 and share < 1.0):
            yield chunk


def read_texts(files: Sequence[InputFile], keys: Sequence[str], max_bytes: float | None) -> Iterator[str]:
    """The texts, with a progress bar over the input. Raises DataError where there is none."""
    total = sum(source.size for source in files)
    bar = Bar("reading", min(total, int(max_bytes or total)))
    num_texts = num_bad = 0
    reason = ""
    for chunk in selected(files, max_bytes):
        documents = read_documents(chunk, keys)
        num_bad += len(documents.bad)
        reason = reason or next((f"{chunk.paths[0]}: {bad.reason}" for bad in documents.bad), "")
        for texts in documents.texts.values():
            num_texts += len(texts)
            yield from texts
        bar.advance(chunk.size, f"{num_texts:,} texts")
    if num_bad:
        bar.message(f"{num_bad:,} bad lines were left out; the first: {reason}")
    bar.close()
    if not num_texts:
        why = f"holds no text{f' ({reason})' if reason else ''}."
        raise input_error(f"--input {files[0].path}", why, f"Check the file and --jsonl-keys {' '.join(keys)}.")
    bar.message(f"Learning to merge, after {num_texts:,} texts ...")


def save(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Write the tokenizer; the file appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TokenizerError(
            Problem(str(path), f"could not be written: {error.strerror}.", "Choose another --output.")
        ) from error


def describe(tokenizer: tokenizers.Tokenizer, sample: Sequence[str]) -> str:
    """Bytes per token on a sample, and whether its texts come back unchanged."""
    encoded = [tokenizer.encode(text).ids for text in sample]
    unchanged = sum(
        tokenizer.decode(ids, skip_special_tokens=False) == text for ids, text in zip(encoded, sample, strict=True)
    )
    num_bytes = sum(len(text.encode()) for text in sample)
    ratio = num_bytes / max(1, sum(map(len, encoded)))
    return f"{ratio:.2f} bytes per token; {unchanged} of {len(sample)} sample texts come back unchanged"


def run(parsed: argparse.Namespace) -> None:
    """Read, train, save, and say what came of it."""
    start = time.perf_counter()
    files = find_inputs([name for group in parsed.input for name in group.split(",") if name], parsed.suffix)
    max_bytes = None if parsed.max_mb is None else parsed.max_mb * 1e6
    tokenizer = train_byte_level_bpe(
        read_texts(files, parsed.jsonl_keys, max_bytes),
        parsed.vocab_size,
        parsed.special_tokens,
        parsed.min_frequency,
        parsed.nfkc,
        parsed.prefix_space,
    )
    save(tokenizer, Path(parsed.output))
    found = describe(tokenizer, sample_texts(files, parsed.jsonl_keys))
    entries = tokenizer.get_vocab_size()
    print(f"{parsed.output}: {entries:,} entries, {found}. {time.perf_counter() - start:.1f} s.")
    if entries < parsed.vocab_size:
        print(f"{parsed.vocab_size:,} were wanted; no further pair occurs {parsed.min_frequency} times in the corpus.")
    print(f"In the YAML: tokenizer_type: HFTokenizer, vocab_file: {parsed.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is printed without a traceback."""
    try:
        run(parse_arguments(arguments))
    except DeepyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
