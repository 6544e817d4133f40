"""A corpus cut into pieces of a few MB that processes can share.

The one idea: finding work is cheap and in order, doing it is expensive and in any order. A plain JSON-lines file is cut
by byte position without being read; a compressed one is decompressed here, a chunk at a time, so memory stays bounded.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.corpus import InputFile, Kind, input_error

MAX_TEXT_FILES = 256
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A piece of work.

    paths: one file, or several text files. kind: what they hold. start, end: for plain JSON lines, the byte range in
    which lines of this chunk begin. lines: for compressed files, the decompressed lines. size: bytes on disk.
    """

    paths: tuple[Path, ...]
    kind: Kind
    size: int
    start: int = 0
    end: int = 0
    lines: bytes = b""


def chunks(files: Sequence[InputFile], chunk_bytes: int) -> Iterator[Chunk]:
    """Cut `files` into chunks of about `chunk_bytes`, in order; text files that follow each other share a chunk."""
    texts: list[InputFile] = []
    for source in files:
        if source.kind == "text":
            texts.append(source)
            if len(texts) == MAX_TEXT_FILES or sum(text.size for text in texts) >= chunk_bytes:
                yield _text_chunk(texts)
                texts = []
            continue
        if texts:
            yield _text_chunk(texts)
            texts = []
        if source.kind == "jsonl":
            for start in range(0, source.size, chunk_bytes):
                end = min(start + chunk_bytes, source.size)
                yield Chunk((source.path,), "jsonl", end - start, start, end)
        else:
            yield from decompress(source, chunk_bytes)
    if texts:
        yield _text_chunk(texts)


def _text_chunk(texts: list[InputFile]) -> Chunk:
    return Chunk(tuple(text.path for text in texts), "text", sum(text.size for text in texts))


def decompress(source: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Whole lines of a compressed file, about `chunk_bytes` of them at a time."""
    blocks = _BLOCKS[source.kind](source)
    held: list[bytes] = []
    num_held = 0
    before = 0
    for block, position in blocks:
        held.append(block)
        num_held += len(block)
        if num_held < chunk_bytes or b"\n" not in block:
            continue
        lines, _, rest = b"".join(held).rpartition(b"\n")
        yield Chunk((source.path,), source.kind, position - before, lines=lines + b"\n")
        held, num_held, before = [rest], len(rest), position
    if num_held:
        yield Chunk((source.path,), source.kind, source.size - before, lines=b"".join(held))


def _gzip_blocks(source: InputFile) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks, each with the position in the compressed file."""
    with open(source.path, "rb") as file, gzip.GzipFile(fileobj=file) as reader:
        try:
            while block := reader.read(READ_BYTES):
                yield block, file.tell()
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(source, str(error)) from error


def _zstd_blocks(source: InputFile) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of all frames, each with the position in the compressed file."""
    try:
        import zstandard
    except ImportError as error:
        fix = "pip install zstandard"
        raise input_error(str(source.path), "needs zstandard, which is not installed.", fix) from error
    frame, pending = zstandard.ZstdDecompressor().decompressobj(), False
    with open(source.path, "rb") as file:
        while data := file.read(READ_BYTES):
            while data:
                try:
                    block = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _damaged(source, str(error)) from error
                if block:
                    yield block, file.tell()
                data, pending = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if pending:
        raise _damaged(source, "it ends in the middle of a frame")


_BLOCKS = {"jsonl.gz": _gzip_blocks, "jsonl.zst": _zstd_blocks}


def _damaged(source: InputFile, reason: str) -> Exception:
    return input_error(str(source.path), f"cannot be decompressed: {reason}.", "It is damaged; copy it again.")
