"""Reading the files of a tokenizer, with errors that name the file and what to do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron.errors import Problem, TokenizerError

TRAIN = "tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.json trains one."


def tokenizer_error(what: str, why: str, fix: str) -> TokenizerError:
    """A TokenizerError of one problem."""
    return TokenizerError(Problem(what=what, why=why, fix=fix))


def required_file(key: str, value: str | None, kind: str, content: str, fix: str = TRAIN) -> Path:
    """The file that `key` names.

    key: `vocab_file` or `merge_file`; value: its setting; kind: the tokenizer_type; content: what the file should hold.
    Raises TokenizerError where the key is not set or the file does not exist.
    """
    if value is None:
        raise tokenizer_error(
            f"{key} is not set", f"tokenizer_type {kind} needs {content}.", f"Set {key} to its path. {fix}"
        )
    path = Path(value)
    if path.is_dir():
        raise tokenizer_error(
            f"{key} = {value}", f"is a folder; {kind} needs {content}.", f"Name the file in it. {fix}"
        )
    if not path.is_file():
        raise tokenizer_error(
            f"{key} = {value}", f"there is no such file; {kind} needs {content}.", f"Correct the path. {fix}"
        )
    return path


def read_json(path: Path, content: str) -> Any:
    """The JSON value in `path`, which should hold `content`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise tokenizer_error(str(path), f"is not JSON ({error}).", f"It should hold {content}.") from error


def hash_of(*parts: object) -> str:
    """Sha256 in hex over `parts` as canonical JSON, so that neither order of keys nor white space matters."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())
        digest.update(b"\0")
    return digest.hexdigest()
