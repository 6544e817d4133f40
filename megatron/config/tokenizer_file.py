"""The vocabulary of a tokenizer.json, counted without a tokenizer library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.errors import Problem

_FORM = "Give a tokenizer.json of Hugging Face's tokenizers; tools/train_tokenizer.py trains one."


def count_tokens(file: str) -> int | Problem:
    """Return the number of ids of a tokenizer.json, or why it is clearly none."""
    what = f"vocab_file = {file}"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        return Problem(what, f"it cannot be read ({error.strerror}).", "Make it readable.")
    except (ValueError, RecursionError) as error:
        return Problem(what, f"it is not JSON ({error}), but tokenizer_type HFTokenizer needs it to be.", _FORM)
    tokens = _tokens(content)
    if tokens is None:
        kind = "a list" if isinstance(content, list) else "JSON"
        return Problem(what, f'it is {kind} without the entry "model" with a "vocab", so no tokenizer.', _FORM)
    return len(tokens)


def _tokens(content: Any) -> set[str] | None:
    """Return the texts of the model's tokens and of those added to them; None where the form is another."""
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = (content.get("added_tokens") or []) if isinstance(content, dict) else []
    try:
        if isinstance(vocabulary, list):  # unigram models: pairs of a text and its score
            vocabulary = [entry[0] for entry in vocabulary]
        return {*vocabulary, *(token["content"] for token in added)} if vocabulary is not None else None
    except (TypeError, KeyError, IndexError):
        return None
