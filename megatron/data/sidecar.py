"""`<prefix>.json` beside a token file: what it holds and which tokenizer made it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.errors import DataError, Problem


@dataclass(frozen=True)
class Sidecar:
    """The content of the file, one JSON key per field.

    documents: including those without tokens. tokens: with the end-of-document ids. bytes: of text as UTF-8.
    empty_documents, bad_lines: input left out. inputs: the first hundred files; num_inputs: how many there were.
    tokenizer_sha256: its fingerprint, which training compares with that of its own tokenizer.
    """

    documents: int
    tokens: int
    bytes: int
    empty_documents: int
    bad_lines: int
    dtype: str
    append_eod: bool
    key: str
    inputs: list[str]
    num_inputs: int
    tokenizer_type: str
    tokenizer_sha256: str
    vocab_size: int
    vocab_file: str | None
    merge_file: str | None


def sidecar_path(prefix: str | Path) -> Path:
    """The sidecar of the token file `prefix`."""
    return Path(f"{prefix}.json")


def write_sidecar(prefix: str | Path, sidecar: Sidecar) -> None:
    """Write it; the file appears complete or not at all. Raises DataError where the disk is full."""
    path = sidecar_path(prefix)
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(sidecar), indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        problem = Problem(str(path), f"could not be written: {error.strerror}.", "Free some space and run again.")
        raise DataError(problem) from error
