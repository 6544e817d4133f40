"""GPT2BPETokenizer: GPT-2's byte-level BPE from its two files, vocab.json and merges.txt.

The ids are those of the original GPT-2 code: its splitting expression, no prefix space, and `<|endoftext|>` in the
text is the special token.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron.tokenizer.backend import BackendTokenizer
from megatron.tokenizer.files import read_json, required_file, tokenizer_error
from megatron.tokenizer.special import END_OF_DOCUMENT

KIND = "GPT2BPETokenizer"
SOURCE = "For one tokenizer.json instead, set tokenizer_type to HFTokenizer."


def load_gpt2_bpe(vocab_file: str | None, merge_file: str | None) -> BackendTokenizer:
    """The tokenizer of `vocab_file` (token to id, JSON) and `merge_file` (one merge a line, first line a version)."""
    vocab = required_file("vocab_file", vocab_file, KIND, "GPT-2's vocab.json", SOURCE)
    merges = required_file("merge_file", merge_file, KIND, "GPT-2's merges.txt", SOURCE)
    backend = byte_level_bpe(vocab, merges)
    if backend.token_to_id(END_OF_DOCUMENT) is not None:
        backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return BackendTokenizer(KIND, str(vocab), backend)


def byte_level_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's algorithm over the two files."""
    ids = read_json(vocab, "GPT-2's vocab.json, token to id")
    if not isinstance(ids, dict) or not all(isinstance(value, int) for value in ids.values()):
        raise tokenizer_error(f"vocab_file = {vocab}", "is JSON, but not a map from token to id.", SOURCE)
    pairs = read_merges(merges)
    try:
        model = models.BPE(ids, pairs)
    except Exception as error:  # the library raises bare Exception
        why = f"do not fit together: {error}."
        raise tokenizer_error(
            f"vocab_file = {vocab}, merge_file = {merges}", why, "Take both from one model."
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of merges.txt in order; the `#version` line and empty lines hold none."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not right or " " in right:
            raise tokenizer_error(f"{path}:{number}", f"is not a merge of two tokens: {line[:40]!r}.", SOURCE)
        merges.append((left, right))
    return merges
