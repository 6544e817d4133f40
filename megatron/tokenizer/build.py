"""From the YAML's tokenizer_type, vocab_file and merge_file to a tokenizer: the one place that chooses the kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.char_level import load_char_level
from megatron.tokenizer.files import tokenizer_error
from megatron.tokenizer.gpt2_bpe import load_gpt2_bpe
from megatron.tokenizer.hf import load_hf
from megatron.tokenizer.hf_gpt2 import load_hf_gpt2
from megatron.tokenizer.spm import load_spm
from megatron.tokenizer.tiktoken_bpe import load_tiktoken

if TYPE_CHECKING:
    from megatron.config.schema.data import TokenizerConfig

LOADERS: dict[str, Callable[[str | None, str | None], Tokenizer]] = {
    "GPT2BPETokenizer": load_gpt2_bpe,
    "HFTokenizer": load_hf,
    "HFGPT2Tokenizer": load_hf_gpt2,
    "SPMTokenizer": load_spm,
    "CharLevelTokenizer": load_char_level,
    "TiktokenTokenizer": load_tiktoken,
}


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a resolved config. Raises TokenizerError for files that are missing or of another kind."""
    return load_tokenizer(config.tokenizer_type, config.vocab_file, config.merge_file)


def load_tokenizer(kind: str, vocab_file: str | None = None, merge_file: str | None = None) -> Tokenizer:
    """The tokenizer of `kind`, written in any case, from its files."""
    kinds = {known.lower(): loader for known, loader in LOADERS.items()}
    if kind.lower() not in kinds:
        raise tokenizer_error(
            f"tokenizer_type = {kind}", "is not a known kind.", f"Choose one of {', '.join(LOADERS)}."
        )
    return kinds[kind.lower()](vocab_file, merge_file)
