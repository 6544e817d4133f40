"""A corpus to token files: the library behind tools/preprocess_data.py.

The one idea: documents are independent, so worker processes each take a chunk of the input, parse it, encode it and
hand back one array; the parent appends the arrays in the order of the input. The output is therefore the same for every
number of workers and every size of chunk, and memory is bounded by the chunks in flight.

For the key `text` and the prefix `data/c`, `data/c_text_document.bin` and `.idx` are byte-identical to GPT-NeoX's, and
`data/c_text_document.json` beside them counts what they hold and names the tokenizer. Empty documents are left out, as
there. A document that has text but no ids gets its end-of-document id all the same (there: a crash), or, without
one, an entry in doc_idx only (as there).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.chunks import Chunk, chunks
from megatron.data.corpus import InputFile, input_error
from megatron.data.indexed import IndexedWriter, token_dtype
from megatron.data.reading import BadLine, read_documents, sample_texts
from megatron.data.sidecar import Sidecar, sidecar_path, write_sidecar
from megatron.data.workers import WorkerDiedError, ordered
from megatron.tokenizer.fast import DocumentEncoder, choose_encoder

LEAST_CHUNK_BYTES, CHUNK_BYTES = 1 << 18, 8 << 20
EARLY_LINES = 100
"""After this many lines, a corpus that is mostly bad is given up at once: the key or the format is wrong."""


@dataclass(frozen=True)
class Job:
    """What to make.

    files: the input in order. prefix: where to write; `_<key>_document` is appended. keys: of the JSON objects, each
    with its own output. encoder: see `encoder_for`. append_eod: end each document with the tokenizer's `eod`. fix_text:
    mend broken Unicode with ftfy first. workers: processes. max_bad_fraction: share of bad lines above which the job
    fails. tokenizer_files: vocab_file and merge_file, for the sidecar.
    """

    files: Sequence[InputFile]
    prefix: str
    encoder: DocumentEncoder
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    fix_text: bool = False
    workers: int = 1
    max_bad_fraction: float = 0.01
    tokenizer_files: tuple[str | None, str | None] = (None, None)

    @property
    def end(self) -> int | None:
        """The id after each document, if one is wanted."""
        return self.encoder.tokenizer.eod if self.append_eod else None

    @property
    def dtype(self) -> np.dtype[Any]:
        """What tokens are stored in."""
        return token_dtype(self.encoder.tokenizer.vocab_size)

    def output(self, key: str) -> str:
        """The path, without suffix, of the files for `key`."""
        return f"{self.prefix}_{key}_document"


@dataclass
class Counts:
    """What went into one output. num_bytes: of text as UTF-8. num_empty, num_bad: input lines that are no document."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_lines: int = 0
    num_empty: int = 0
    num_bad: int = 0


@dataclass(frozen=True)
class Encoded:
    """A chunk after the work: per key the ids, the number of ids of each document, and the bytes of text."""

    paths: tuple[Path, ...]
    kind: str
    size: int
    columns: dict[str, tuple[NDArray[Any], NDArray[np.int64], int]]
    num_lines: int
    num_empty: int
    bad: list[BadLine] = field(default_factory=list)


Progress = Callable[[int, Counts], None]
"""Called after each chunk with the bytes of input done since the last call, and the counts so far (first key)."""


def encoder_for(tokenizer: Any, files: Sequence[InputFile], keys: Sequence[str]) -> DocumentEncoder:
    """The fastest encoder that gives the tokenizer's ids on a sample of `files`; its `reason` is worth printing."""
    return choose_encoder(tokenizer, sample_texts(files, keys))


def preprocess(job: Job, progress: Progress, report: Callable[[str], None]) -> dict[str, Counts]:
    """Write the token files of `job` and return the counts of each key.

    report: called with `file:line: reason` for bad lines. Nothing appears under the final names before all is done.
    Raises DataError for unreadable input, too many bad lines, no documents at all, a full disk or a dead worker.
    """
    if job.fix_text:
        _require_ftfy()
    counts = {key: Counts() for key in job.keys}
    lines_before: dict[Path, int] = {}
    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(job.output(key), job.dtype)) for key in job.keys}
        for encoded in stack.enter_context(closing(_encode_all(job))):
            _report_bad(encoded, lines_before.get(encoded.paths[0], 0), report)
            lines_before[encoded.paths[0]] = lines_before.get(encoded.paths[0], 0) + encoded.num_lines
            for key, (tokens, sizes, num_bytes) in encoded.columns.items():
                writers[key].add_documents(tokens, sizes)
                _count(counts[key], encoded, tokens.size, sizes.size, num_bytes)
            first = counts[job.keys[0]]
            _check_bad_lines(first, job, finished=False)
            progress(encoded.size, first)
        _check_bad_lines(counts[job.keys[0]], job, finished=True)
        for key in job.keys:
            _check_documents(counts[key], job)
            sidecar_path(job.output(key)).unlink(missing_ok=True)  # an old one must not describe new tokens
    for key in job.keys:
        write_sidecar(job.output(key), _sidecar(job, key, counts[key]))
    return counts


def _encode_all(job: Job) -> Generator[Encoded, None, None]:
    """The encoded chunks in the order of the input, from `job.workers` processes; one worker needs no process."""
    share = sum(source.size for source in job.files) // (4 * job.workers)
    work = chunks(job.files, max(LEAST_CHUNK_BYTES, min(CHUNK_BYTES, share)))
    if job.workers == 1:
        yield from (encode_chunk(job, chunk) for chunk in work)
        return
    # Forked workers inherit the loaded tokenizer; no thread pool of a tokenizer has been started before this point.
    try:
        yield from ordered(functools.partial(encode_chunk, job), work, job.workers)
    except WorkerDiedError as error:
        raise input_error(
            f"a worker of {job.workers}",
            "was killed, most likely because memory ran out.",
            "Use fewer --workers. No file was left behind.",
        ) from error


def encode_chunk(job: Job, chunk: Chunk) -> Encoded:
    """Read, mend if asked, and encode the documents of one chunk."""
    documents = read_documents(chunk, job.keys)
    columns = {}
    for key, texts in documents.texts.items():
        if job.fix_text:
            texts = _fix(texts)
        tokens, sizes = job.encoder.encode(texts, job.end, job.dtype)
        columns[key] = tokens, sizes, sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return Encoded(
        chunk.paths, chunk.kind, chunk.size, columns, documents.num_lines, documents.num_empty, documents.bad
    )


def _require_ftfy() -> None:
    try:
        import ftfy  # noqa: F401
    except ImportError as error:
        raise input_error(
            "--ftfy", "needs ftfy, which is not installed.", "pip install -r requirements/ftfy.txt"
        ) from error


def _fix(texts: list[str]) -> list[str]:
    import ftfy

    return [ftfy.fix_text(text) for text in texts]


def _count(counts: Counts, encoded: Encoded, num_tokens: int, num_documents: int, num_bytes: int) -> None:
    counts.num_documents += num_documents
    counts.num_tokens += num_tokens
    counts.num_bytes += num_bytes
    counts.num_lines += encoded.num_lines
    counts.num_empty += encoded.num_empty
    counts.num_bad += len(encoded.bad)


def _report_bad(encoded: Encoded, lines_before: int, report: Callable[[str], None]) -> None:
    for bad in encoded.bad:
        if encoded.kind == "text":
            report(f"{encoded.paths[bad.number]}: {bad.reason}")
        else:
            report(f"{encoded.paths[0]}:{lines_before + bad.number + 1}: {bad.reason}")


def _check_bad_lines(counts: Counts, job: Job, finished: bool) -> None:
    """Too many bad lines at the end, or mostly bad ones at the beginning, are an error of the input as a whole."""
    allowed = job.max_bad_fraction if finished else max(0.5, job.max_bad_fraction)
    if counts.num_bad <= allowed * counts.num_lines or (not finished and counts.num_lines < EARLY_LINES):
        return
    share = counts.num_bad / counts.num_lines
    raise input_error(
        f"{counts.num_bad:,} of {counts.num_lines:,} lines",
        f"are no documents ({share:.2%}; allowed are {job.max_bad_fraction:.2%}). They are listed above.",
        f"Mend the input, choose other --jsonl-keys, or allow them with --max-bad-lines {min(1.0, share * 1.1):.2g}",
    )


def _check_documents(counts: Counts, job: Job) -> None:
    if counts.num_tokens == 0:
        names = ", ".join(str(source.path) for source in job.files[:3])
        raise input_error(
            f"--input {names}",
            f"holds no text: {counts.num_lines:,} lines, {counts.num_empty:,} of them empty documents.",
            f"Check the files and --jsonl-keys {' '.join(job.keys)}.",
        )


def _sidecar(job: Job, key: str, counts: Counts) -> Sidecar:
    tokenizer = job.encoder.tokenizer
    return Sidecar(
        documents=counts.num_documents,
        tokens=counts.num_tokens,
        bytes=counts.num_bytes,
        empty_documents=counts.num_empty,
        bad_lines=counts.num_bad,
        dtype=str(job.dtype),
        append_eod=job.append_eod,
        key=key,
        inputs=[str(source.path) for source in job.files[:100]],
        num_inputs=len(job.files),
        tokenizer_type=tokenizer.name,
        tokenizer_sha256=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        vocab_file=job.tokenizer_files[0],
        merge_file=job.tokenizer_files[1],
    )
