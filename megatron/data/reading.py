"""A chunk of a corpus turned into texts, and the lines that are no documents.

A text file is one document, its line ends read as "\\n". A line of JSON lines is an object with the wanted keys, or a
plain string; a list of strings is joined with empty lines, as lm_dataformat does for GPT-NeoX.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.data.chunks import Chunk, decompress
from megatron.data.corpus import InputFile, input_error

READ_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class BadLine:
    """A line, counted from 0 within its chunk, that is no document; for text files the number of the file."""

    number: int
    reason: str


@dataclass
class ChunkTexts:
    """What a chunk holds: per key one text for each document, and what was left out."""

    texts: dict[str, list[str]]
    num_lines: int = 0
    num_empty: int = 0
    bad: list[BadLine] = field(default_factory=list)


def read_documents(chunk: Chunk, keys: Sequence[str]) -> ChunkTexts:
    """The documents of `chunk`: for each of `keys` a list of texts, all of one length.

    Lines in which every key is empty are counted in `num_empty` and left out, as in GPT-NeoX. Lines that are no
    documents are in `bad`. Raises DataError for a file that has disappeared.
    """
    documents = ChunkTexts({key: [] for key in keys})
    try:
        if chunk.kind == "text":
            _read_texts(chunk.paths, documents)
        else:
            _read_lines(_lines(chunk), keys, documents)
    except OSError as error:
        place = error.filename or chunk.paths[0]
        raise input_error(
            str(place), f"could not be read: {error.strerror}.", "Check the file and run again."
        ) from error
    return documents


def sample_texts(files: Sequence[InputFile], keys: Sequence[str], num_characters: int = 131072) -> list[str]:
    """Documents from all over `files`, cut so that they have about `num_characters` together, for a quick check."""
    places = 16
    chosen = [files[index * len(files) // places] for index in range(min(places, len(files)))]
    per_source = -(-places // max(1, len(chosen)))
    texts = [text for source in chosen for text in _peek(source, per_source, keys)]
    share = num_characters // max(1, len(texts))
    return [text[:share] for text in texts if text]


def _lines(chunk: Chunk) -> bytes:
    """The lines that belong to `chunk`: those that begin in its byte range, the last one read to its end."""
    if chunk.kind != "jsonl":
        return chunk.lines
    with open(chunk.paths[0], "rb") as file:
        if chunk.start:
            file.seek(chunk.start - 1)
            file.readline()
        begin = file.tell()
        lines = file.read(max(0, chunk.end - begin))
        return lines if lines.endswith(b"\n") or not lines else lines + file.readline()


def _read_lines(data: bytes, keys: Sequence[str], documents: ChunkTexts) -> None:
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    documents.num_lines = len(lines)
    decode = json.JSONDecoder().decode
    for number, line in enumerate(lines):
        if not line or line.isspace():
            continue
        try:
            _add(_texts_of(decode(line.decode()), keys), documents)
        except (ValueError, RecursionError) as error:
            documents.bad.append(BadLine(number, _reason(error, line)))


def _texts_of(value: Any, keys: Sequence[str]) -> list[str]:
    """The text of each key. Raises ValueError, with the reason, for a value that is no document."""
    if isinstance(value, str):
        if len(keys) > 1:
            raise ValueError("is a plain string, and several keys are wanted")
        return [_checked(value)]
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, not an object")
    texts = []
    for key in keys:
        if key not in value:
            raise ValueError(f"has no key {key!r}; its keys are {', '.join(map(repr, list(value)[:6]))}")
        text = value[key]
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = "\n\n".join(text)
        if not isinstance(text, str):
            raise ValueError(f"key {key!r} holds {type(text).__name__}, not a string")
        texts.append(_checked(text))
    return texts


def _checked(text: str) -> str:
    """`text`, or ValueError where it holds half of a surrogate pair (as from `\\ud83d` alone)."""
    if not text.isascii():
        text.encode()
    return text


def _reason(error: Exception, line: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"holds half of a surrogate pair at character {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg} at column {error.colno}): {line[:40].decode(errors='replace')!r}"
    return str(error) or type(error).__name__


def _add(texts: list[str], documents: ChunkTexts) -> None:
    if not any(texts):
        documents.num_empty += 1
        return
    for column, text in zip(documents.texts.values(), texts, strict=True):
        column.append(text)


def _read_texts(paths: Sequence[Path], documents: ChunkTexts) -> None:
    """One document per file, the same text under every key."""
    documents.num_lines = len(paths)
    for number, path in enumerate(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            documents.bad.append(BadLine(number, f"is not UTF-8 at byte {error.start}"))
            continue
        _add([text] * len(documents.texts), documents)


def _peek(source: InputFile, count: int, keys: Sequence[str]) -> list[str]:
    """The documents at `count` places of `source`; of a compressed file the first ones."""
    documents = ChunkTexts({key: [] for key in keys})
    if source.kind == "text":
        with open(source.path, encoding="utf-8", errors="replace") as file:
            return [file.read(READ_CHARACTERS)]
    if source.kind == "jsonl":
        lines = list(_lines_at(source, [index * source.size // count for index in range(count)]))
    else:
        first = next(decompress(source, READ_CHARACTERS), None)
        lines = list(islice(first.lines.split(b"\n"), count)) if first else []
    _read_lines(b"\n".join(lines), keys, documents)
    return [text for texts in documents.texts.values() for text in texts]


def _lines_at(source: InputFile, positions: Sequence[int]) -> Iterator[bytes]:
    """The first line that begins at or after each of `positions`."""
    with open(source.path, "rb") as file:
        for position in positions:
            file.seek(max(0, position - 1))
            if position:
                file.readline()
            yield file.readline().rstrip(b"\n")
