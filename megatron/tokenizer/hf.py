"""HFTokenizer: one `tokenizer.json` in the format of the `tokenizers` library. It never needs the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from megatron.tokenizer.backend import BackendTokenizer
from megatron.tokenizer.files import TRAIN, required_file, tokenizer_error

CONTENT = "a tokenizer.json of the tokenizers library"


def load_hf(vocab_file: str | None, merge_file: str | None = None) -> BackendTokenizer:
    """The tokenizer in `vocab_file`; a tokenizer_config.json beside it may name its eos_token and pad_token."""
    path = required_file("vocab_file", vocab_file, "HFTokenizer", CONTENT)
    named = named_special_tokens(path.parent)
    return BackendTokenizer(
        "HFTokenizer", str(path), load_backend(path), named.get("eos_token"), named.get("pad_token")
    )


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The `tokenizers.Tokenizer` stored in `path`."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise tokenizer_error(
            f"vocab_file = {path}", f"is not {CONTENT}: {error}.", f"Name another file. {TRAIN}"
        ) from error


def named_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by role (`eos_token`, `pad_token` ...) that the folder's own files name, if any."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for role, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(text, str):
                named[role] = text
    return named
